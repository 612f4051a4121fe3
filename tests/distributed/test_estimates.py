"""Estimates equal what real ranks keep, send and compute, for every engine and optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spectral_dist.estimate import Job, estimate
from spectral_dist.launch import llama
from tests.support import estimates, harness

Case = tuple[str, Mapping[str, Any]]
BUCKET = 36 * 87 * 4 / 2**20
"""MiB of the largest matrix, so that there are many buckets."""
OWNER: list[Case] = [
    ("muon", {}),
    ("muon", {"bucket_mb": BUCKET, "wire_dtype": "bfloat16"}),
    ("normuon", {}),
    ("polargrad", {"polar_first": True}),
    ("root", {"bucket_mb": BUCKET}),
    ("sumo", {"rank": 5, "bucket_mb": BUCKET, "period": 1000}),
]
GRAM: list[Case] = [
    # the estimate computes as a GPU does, where 'auto' is bfloat16
    ("muon", {"strategy": "gram", "polar_dtype": "float32", "polar": "gram_jordan"}),
    ("normuon", {"strategy": "gram", "polar_dtype": "float32", "bucket_mb": BUCKET}),
    ("root", {"strategy": "gram", "polar_dtype": "float32"}),
    ("sumo", {"rank": 5, "strategy": "gram", "period": 1000}),
]


def check(
    tmp_path: Path, world: int, engine: str, cases: Sequence[Case], model: str = "llama",
    tp: int = 1, nodes: int = 1,
) -> None:  # fmt: skip
    """Compare every rank of a run of each case with its estimate."""
    ranks = harness.run(world, estimates.measure, model, engine, cases, tp=tp, nodes=nodes)
    job = Job.from_user(
        engine, dp=world // tp, tp=tp, nodes=nodes, dtype="float32", device="cpu", sub_group=2000
    )
    wrong = []
    for number, (optimizer, options) in enumerate(cases):
        empty = llama.build_empty(estimates.config_file(model, tmp_path))
        if optimizer == "poet":
            empty = estimates.convert(empty)
        expected = estimate(empty, job, optimizer, {"lr": 1e-3, **options})
        for rank in range(world):
            found = {name: int(values[rank]) for name, values in expected.by_rank.items()}
            measured = ranks[rank][number]
            found = {name: found[name] for name in measured}
            if found != measured:
                wrong.append((optimizer, dict(options), rank, found, measured))
    assert wrong == []


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"])
def test_two_ranks(engine: str, tmp_path: Path) -> None:
    check(tmp_path, 2, engine, OWNER)
    check(tmp_path, 2, engine, [("poet", {})], "even")


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero3"])
def test_slabs(engine: str, tmp_path: Path) -> None:
    check(tmp_path, 2, engine, GRAM)


@pytest.mark.parametrize(("engine", "tp", "nodes"), [("hsdp", 1, 2), ("fsdp", 2, 1)])
def test_meshes_of_four_ranks(engine: str, tp: int, nodes: int, tmp_path: Path) -> None:
    check(tmp_path, 4, engine, OWNER, "even", tp, nodes)
    check(tmp_path, 4, engine, GRAM, "even", tp, nodes)
