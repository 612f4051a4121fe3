"""SUMO's matrix state saved under one layout of plain torch, and taken up under another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spectral_dist
from tests.distributed.torch import layouts
from tests.distributed.torch.sumo_runs import OPTIONS, STEPS, alone
from tests.reference import training
from tests.support import harness
from tests.support.quiet import quiet

WAYS = [
    [("ddp", 4, {}), ("fsdp", 3, {"strategy": "gram"}), ("one", 1, {})],
    [("tp_fsdp", 4, {"strategy": "gram"}), ("ddp", 2, {}), ("tp", 2, {"strategy": "gram"})],
    [("one", 1, {}), ("hsdp", 4, {}), ("fsdp", 2, {})],
]


def part(
    layout: str, options: dict[str, Any], first: int, last: int, load: str, save: str
) -> dict[str, Any]:
    """Steps [first, last) of a run, from checkpoint ``load`` to ``save``; '' is none."""
    placed = layouts.build(layout)
    with quiet():
        groups = spectral_dist.param_groups(placed.model, split={"qkv": 3})
        optimizer = spectral_dist.SUMO(groups, **{**OPTIONS, **options})
        if load:
            extra = spectral_dist.checkpoint.load(load, placed.model, optimizer)
            assert extra == {"step": first}
        for step in range(first, last):
            placed.backward(step)
            optimizer.step()
        if save:
            spectral_dist.checkpoint.save(save, placed.model, optimizer, step=last)
    return placed.full()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(layout for layout, *_ in way))
@pytest.mark.fast_cases("ddp fsdp one")
def test_saved_and_loaded_under_another_layout(way: list[Any], tmp_path: Path) -> None:
    """In the middle of a period, on other ranks, at owners or in slabs: one process's numbers."""
    steps, load = (0, 7, 13, STEPS), ""
    for number, (layout, world, options) in enumerate(way):
        save = str(tmp_path / str(number))
        first, last = steps[number : number + 2]
        ranks = harness.run(world, part, layout, options, first, last, load, save)
        load = save
    wanted = alone("paper", True)["parameters"]
    for found in ranks:
        for name, value in wanted.items():
            error = float((found[name] - value).abs().max())
            assert error < (1e-6 if training.is_matrix(name) else 1e-5), (name, error)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.fast_cases("fsdp")
def test_bit_by_bit_on_the_same_ranks(layout: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    whole = harness.run(2, part, layout, {}, 0, 14, "", "")
    harness.run(2, part, layout, {}, 0, 9, "", folder)
    for wanted, found in zip(whole, harness.run(2, part, layout, {}, 9, 14, folder, ""),
                             strict=True):  # fmt: skip
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def errors(folder: str) -> list[str]:
    """What is said on this rank where a checkpoint does not fit, or there is no whole state."""
    found = []
    placed = layouts.build("ddp")
    with quiet():
        groups = spectral_dist.param_groups(placed.model, split={"qkv": 3})
        optimizer = spectral_dist.SUMO(groups, **{**OPTIONS, "rank": 3})
        muon = spectral_dist.Muon(spectral_dist.param_groups(placed.model, split={"qkv": 3}))
        placed.backward(0)
        optimizer.step()
        for attempt in (
            lambda: spectral_dist.checkpoint.load(folder, placed.model, optimizer),
            lambda: spectral_dist.checkpoint.load(folder, placed.model, muon),
            optimizer.state_dict,
        ):
            try:
                attempt()
                found.append("")
            except ValueError as error:
                found.append(str(error))
    return found


def test_errors(tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    harness.run(2, part, "ddp", {}, 0, 1, "", folder)
    for rank, muon, state_dict in harness.run(2, errors, folder):
        assert "in the checkpoint; write the rank that it was saved with" in rank
        assert "another optimizer: SUMO, and this one is Muon" in muon
        assert "spectral_dist.checkpoint.save" in state_dict
