"""Rules that are not of the package (``outside_rules``), through every check and real frameworks.

They are registered on ranks of pools of their own, and never in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import contract_runs
from tests.distributed.contract_runs import MEGATRON, distance
from tests.support import harness

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.distributed.outside_rules"
BOUND = 1e-5
IN_TORCH, IN_MEGATRON = "outside rules", f"outside rules {MEGATRON}"
OPTIONS: dict[str, dict[str, Any]] = {
    "RowSign": {"softness": 0.5, "warm": True},
    "Lagging": {"row_decay": 0.8, "lag": 0.4},
}
RATES = {"RowSign": 0.002, "Lagging": 0.02}
BAD: dict[str, list[tuple[str, Any]]] = {
    "RowSign": [("softness", 0.0), ("softness", "soft"), ("warm", 1), ("momentum", 1.0)],
    "Lagging": [("row_decay", 1.5), ("lag", None), ("limit", 0), ("limit", 2.5),
                ("shape_by", "row"), ("polar", "jordn")],
}  # fmt: skip
BOTH = pytest.mark.parametrize("title", OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    for (_, name), pool in list(harness.POOLS.items()):
        if name in (IN_TORCH, IN_MEGATRON):
            pool.end()


@pytest.mark.parametrize("title", [pytest.param("RowSign", marks=pytest.mark.slow), "Lagging"])
@pytest.mark.slow
def test_check_rule(title: str) -> None:
    program = (
        "from spectral_dist.testing import check_rule\n"
        f"from {MODULE} import {title}\n"
        f"check_rule({title}, {OPTIONS[title]})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("title", "stage"),
    [
        ("Lagging", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("RowSign", 1), ("RowSign", 3), ("Lagging", 3))
        ),
    ],
)
def test_deepspeed(title: str, stage: int, tmp_path: Path) -> None:
    """One process's weights; a checkpoint, with matrix state beside it if there is any, goes on."""
    options = {"lr": RATES[title], **OPTIONS[title]}
    args = (title, options, stage, str(tmp_path), MODULE)
    for result in harness.run(2, contract_runs.deepspeed, *args, pool=IN_TORCH):
        assert result["alone"] < BOUND
        assert result["resumed"] == 0
        assert result["moved"] > 100 * BOUND


@pytest.mark.parametrize(
    ("title", "wrapping"),
    [
        ("Lagging", {"use_distributed_optimizer": True}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("RowSign", {}), ("RowSign", {"use_distributed_optimizer": True}), ("Lagging", {}),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else f"distributed-{bool(value)}",
)  # fmt: skip
@pytest.mark.slow
def test_megatron(title: str, wrapping: dict[str, Any], tmp_path: Path) -> None:
    """TP 2, saved and restored there; then restored in one process, whose weights they are."""
    name, folder = f"spectral_{title.lower()}", str(tmp_path)
    args = (name, OPTIONS[title], {"tp": 2}, wrapping, folder, MODULE)
    cut = harness.run(2, contract_runs.megatron, *args, pool=IN_MEGATRON)
    args = (name, OPTIONS[title], {}, wrapping, folder, MODULE, False)
    (alone,) = harness.run(1, contract_runs.megatron, *args, pool=IN_MEGATRON)
    assert distance(alone["initial"], alone["weights"]) > 100 * BOUND
    for result in cut:
        assert distance(result["weights"], alone["weights"]) < BOUND
        assert distance(result["resumed"], result["weights"]) == 0
    assert distance(alone["resumed"], alone["weights"]) < BOUND


@BOTH
def test_bad_options_in_code_and_in_groups(title: str) -> None:
    for name, value in BAD[title]:
        args = (title, name, value, MODULE)
        for said in harness.run(1, contract_runs.refused_by_torch, *args, pool=IN_TORCH)[0]:
            assert name in said, (name, value, said)


@BOTH
def test_bad_options_in_deepspeed(title: str) -> None:
    for name, value in BAD[title]:
        args = (title, name, value, MODULE)
        for both in harness.run(2, contract_runs.refused_by_deepspeed, *args, pool=IN_TORCH):
            for said in both:
                assert name in said, (name, value, said)


@BOTH
def test_bad_options_in_flags_of_megatron(title: str) -> None:
    for name, value in BAD[title]:
        args = (f"spectral_{title.lower()}", name, str(value), MODULE)
        (said,) = harness.run(1, contract_runs.refused_by_megatron, *args, pool=IN_MEGATRON)
        assert name.replace("_", "-") in said or name in said, (name, value, said)


@pytest.mark.parametrize(
    ("title", "strategy", "text"),
    [
        ("RowSign", "gram", "this rule needs whole matrices"),
        ("Lagging", "block", "the rule keeps state of whole matrices"),
    ],
)
def test_strategies_that_do_not_fit(title: str, strategy: str, text: str) -> None:
    for layout in ("fsdp", "tp"):
        args = (title, {"strategy": strategy}, layout, MODULE)
        for said in harness.run(2, contract_runs.refused_in_a_step, *args, pool=IN_TORCH):
            assert f"strategy is {strategy!r}" in said
            assert text in said
            assert "strategy='owner'" in said
