"""Megatron-core's Muon in its three modes, and ours, as benchmarks/megatron_step.py measures them.

All ranks are one tensor-parallel group. What is counted and timed is the optimizer's step alone,
in which AdamW sends nothing; its error is from the update in float64.
"""

from __future__ import annotations

import contextlib
import io
import logging
import typing
from importlib.util import find_spec
from typing import Any

import typing_extensions

from benchmarks import megatron_step
from benchmarks.peers.job import Job
from tests.support import megatron_cpu

NAMES = {
    "ours owner": "ours",
    "ours gram": "ours, gram",
    "built-in duplicated": "megatron-core, duplicated",
    "built-in distributed": "megatron-core, distributed",
    "built-in blockwise": "megatron-core, blockwise",
}
"""Contenders of megatron_step by their names here."""
WIDTH, INNER = 256, 512


def run(job: Job) -> list[dict[str, Any]]:
    """Return the rows of this rank."""
    typing.override = typing_extensions.override  # type: ignore[attr-defined]  # from Python 3.12
    logging.getLogger("megatron").setLevel("ERROR")
    row = {"layout": "megatron", "model": "tensor parallel", "scale": job.scale}
    why = "" if job.ranks > 1 else "tensor parallelism takes several ranks"
    if not megatron_cpu.folder(megatron_step.VERSION).exists():
        why = f"no megatron-core {megatron_step.VERSION}: launch/test.sh fetches it"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        there = megatron_step.contenders(find_spec("emerging_optimizers") is not None)
    left_out = dict(line.removeprefix("left out: ").split(": ", 1)
                    for line in said.getvalue().splitlines())  # fmt: skip
    reasons = {name: why or left_out.get(name, "") for name in NAMES}
    names = [name for name in NAMES if not reasons[name] and name in there]
    settings = megatron_step.MegatronSettings(
        job.ranks, 1 if job.tiny else 2, WIDTH, INNER, "bfloat16", job.seconds
    )
    found = {}
    if names:
        megatron_cpu.install(megatron_step.VERSION)
        found = megatron_step.measure(names, settings)
    rows = []
    for name in NAMES:
        rows.append({**row, "name": NAMES[name], "failed": reasons[name]})
        if name in found:
            one = found[name]
            times = [(wall, wall) for wall, _ in one["times"]]
            rows[-1] |= {**one, "times": times}
    return rows
