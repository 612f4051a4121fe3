"""A checkpoint that does not fit on one rank, or on any, is an error on all; then one that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectral_dist
from tests.support import harness, together
from tests.support.together import LAYOUTS, OptimizedModel, expect, quiet

SUMO = {"kind": "SUMO", "rank": 2}


def saved(folder: str, layout: str, sizes: tuple[int, ...] = (), **options: Any) -> None:
    """Two steps and a checkpoint; ``sizes``: of another model."""
    with quiet():
        trial = made(layout, sizes, **options)
        for number in range(2):
            trial.step(number)
        spectral_dist.checkpoint.save(folder, trial.model, trial.optimizer, steps=2)


def made(layout: str, sizes: tuple[int, ...], **options: Any) -> OptimizedModel:
    model = together.plain(*sizes) if len(sizes) == 2 else None
    if len(sizes) == 1:  # one matrix, for two ranks
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, *sizes))
    elif len(sizes) == 3:  # one more
        model = together.plain().append(nn.Linear(6, 9))
    return OptimizedModel(layout, model=model, **options)


def loading(
    right: str, wrong: list[str], layout: str, says: str, sizes: tuple[int, ...], steps: int,
    **options: Any,
) -> None:  # fmt: skip
    """Rank r finds ``wrong[r]``; what is loaded from ``right`` goes on as if nothing had been."""
    with quiet():
        trial = made(layout, sizes, **options)
        for number in range(steps):
            trial.step(number)
        folder = wrong[trial.rank]
        load = spectral_dist.checkpoint.load
        error = together.expect_failure(
            trial, says, lambda: load(folder, trial.model, trial.optimizer)
        )
        for number in range(steps, steps + 1):
            trial.step(number)
        assert load(right, trial.model, trial.optimizer) == {"steps": 2}
        trial.step(2)
        wanted = made(layout, sizes, **options)
        for number in range(3):
            wanted.step(number)
    assert together.same(trial.weights(), wanted.weights())
    assert together.same(trial.states(), wanted.states())
    raise error


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...], dict[str, Any], str]] = {
    "another width": ((6, 10), {}, (6, 8), {}, "1.weight is (8, 6) here, but (10, 6)"),
    "one matrix less": ((6, 8), {}, (6, 8, 1), {}, "4.weight"),
    "one matrix more": ((6, 8, 1), {}, (6, 8), {}, "4.weight"),
    "Muon's by SUMO": ((6, 8), {}, (6, 8), SUMO, "Muon, and this one is SUMO"),
    "SUMO's by Muon": ((6, 8), SUMO, (6, 8), {}, "SUMO, and this one is Muon"),
    "Muon's by NorMuon": ((6, 8), {}, (6, 8), {"kind": "NorMuon"}, "Muon, and this one is NorMuon"),
    "NorMuon's by Muon": ((6, 8), {"kind": "NorMuon"}, (6, 8), {}, "NorMuon, and this one is Muon"),
    "another rank": ((6, 8), {**SUMO, "rank": 3}, (6, 8), SUMO, "write the rank"),
    "another rank of one matrix": ((8,), {**SUMO, "rank": 3}, (8,), SUMO, "write the rank"),
    "SUMO's of another width": ((6, 10), SUMO, (6, 8), SUMO, "1.weight is (8, 6) here"),
}
"""name -> (sizes, options) that were saved, those that load, what is said"""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_checkpoint_of_something_else(layout: str, name: str, steps: int, tmp_path: Path) -> None:
    theirs, other, ours, options, says = CASES[name]
    wrong, right = str(tmp_path / "wrong"), str(tmp_path / "right")
    harness.run(2, saved, wrong, layout, theirs, **other)
    harness.run(2, saved, right, layout, ours, **options)
    expect(says, loading, right, [wrong, wrong], layout, says, ours, steps, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_one_rank_sees_as_empty(layout: str, rank: int, tmp_path: Path) -> None:
    right, empty = str(tmp_path / "right"), str(tmp_path / "empty")
    harness.run(2, saved, right, layout)
    folders = [right, empty] if rank else [empty, right]
    says = f"{empty} holds no checkpoint"
    expect(says, loading, right, folders, layout, says, (), 1)
