"""What SpectralMuon adds to a DeepSpeed step: orthogonalizations, bytes and state, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import engine
from tests.reference import training
from tests.support import harness, models

STEPS = 2
MODEL: dict[str, Any] = {"width": 64, "hidden": 160, "layers": 3, "odd": False}


def sizes() -> dict[str, int]:
    """Elements of each matrix, in the order of the parameters."""
    model = models.build(**MODEL)
    return {n: p.numel() for n, p in model.named_parameters() if training.is_matrix(n)}


def sent_by_flat(owners: dict[str, int], world: int) -> list[int]:
    """Numbers each rank must send at stages 1 and 2, from the flat buffer's equal parts."""
    total = sum(sizes().values())
    part = -(-total // (2 * world)) * 2  # DeepSpeed aligns the flat buffer to 2 x ranks
    sent, begin = [0] * world, 0
    for name, numel in sizes().items():
        runs = [
            max(0, min(begin + numel, (r + 1) * part) - max(begin, r * part)) for r in range(world)
        ]
        for r, run in enumerate(runs):
            if r != owners[name]:
                sent[r] += run  # its run to the owner
                sent[owners[name]] += run  # its run of the direction back
        begin += numel
    return sent


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.fast_cases("1-3")
def test_only_straddling_matrices_move(stage: int, world: int) -> None:
    ranks = harness.run(world, engine.train, engine.config(stage, world), count=STEPS, **MODEL)
    owners = ranks[0]["owners"]
    assert owners.keys() == sizes().keys()
    expected = sent_by_flat(owners, world)
    assert [r["meter"].get("all_to_all", 0) for r in ranks] == [4 * STEPS * n for n in expected]
    # a boundary between two parts cuts at most one matrix
    part, begin, straddling = -(-sum(sizes().values()) // (2 * world)) * 2, 0, []
    for name, numel in sizes().items():
        if begin // part != (begin + numel - 1) // part:
            straddling.append(name)
        begin += numel
    assert len(straddling) <= world - 1
    assert sum(expected) <= 2 * sum(sizes()[name] for name in straddling)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("wire", "width"), [("float32", 4), ("bfloat16", 2)])
def test_stage3_moves_two_shards(world: int, wire: str, width: int) -> None:
    """2 w N / P numbers a rank, w = (P - 1) / P, within 2% summed over ranks."""
    configuration = engine.config(3, world, options={"wire_dtype": wire})
    ranks = harness.run(world, engine.train, configuration, count=STEPS, **MODEL)
    least = 2 * (world - 1) / world * sum(sizes().values()) / world * width * STEPS
    mean = sum(r["meter"]["all_to_all"] for r in ranks) / world
    assert mean == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_matrix_once_and_state_of_a_shard(stage: int, world: int) -> None:
    configuration = engine.config(stage, world, accumulation={2: 3, 3: 2, 4: 3}[world])
    ranks = harness.run(world, engine.train, configuration, count=STEPS, **MODEL)
    assert sum(r["polar_calls"] for r in ranks) == STEPS * len(sizes())
    if world <= len(sizes()):
        assert all(r["polar_calls"] for r in ranks)
    numbers = sum(sizes().values())
    parts = world if stage else 1
    for result in ranks:
        padding = 4 * (2 * world if stage < 3 else len(sizes()))
        assert 0 <= result["state_bytes"] - 4 * numbers / parts <= padding


def test_stage0_gathers_each_direction_once() -> None:
    """w N numbers a rank, and the all-gather's padding is what the balance leaves."""
    ranks = harness.run(4, engine.train, engine.config(0, 4), count=STEPS, **MODEL)
    least = 0.75 * sum(sizes().values()) * 4 * STEPS
    for result in ranks:
        assert least <= result["meter"]["all_gather"] < 1.25 * least
    assert torch.tensor([r["polar_calls"] for r in ranks]).max() <= STEPS * (len(sizes()) // 4 + 2)
