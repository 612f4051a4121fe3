"""State dicts that trainers save: torch's own functions, and ``consolidate_state_dict``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import spectral_dist
from tests.distributed.torch import layouts
from tests.distributed.torch.sumo_runs import OPTIONS
from tests.support import harness
from tests.support.quiet import quiet

RULES: dict[str, dict[str, Any]] = {
    "SUMO": OPTIONS,
    "SUMO gram": {**OPTIONS, "strategy": "gram"},
    "NorMuon": {"lr": 0.02},
    "Muon": {"lr": 0.02},
}
FIRST, LAST = 3, 6


def build(layout: str, rule: str) -> tuple[Any, Any]:
    placed = layouts.build(layout)
    with quiet():
        groups = spectral_dist.param_groups(placed.model, split={"qkv": 3})
        optimizer = getattr(spectral_dist, rule.split()[0])(groups, **RULES[rule])
    return placed, optimizer


def train(placed: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        placed.backward(step)
        with quiet():
            optimizer.step()


def copy_model(placed: Any, other: Any) -> None:
    other.model.load_state_dict(placed.model.state_dict())


def goes_on(placed: Any, optimizer: Any, other: Any, resumed: Any) -> None:
    """A run that goes on, and one that was loaded, have the same weights, bit by bit."""
    train(placed, optimizer, FIRST, LAST)
    train(other, resumed, FIRST, LAST)
    for name, value in placed.full().items():
        assert torch.equal(other.full()[name], value), name


def by_torch(layout: str, rule: str, full: bool, folder: str) -> None:
    """Save as accelerate does under FSDP2: a full state dict of rank 0, or DCP's shards."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)
    placed, optimizer = build(layout, rule)
    train(placed, optimizer, 0, FIRST)
    saved = copy.deepcopy(get_optimizer_state_dict(placed.model, optimizer, options=options))
    if full:
        assert bool(saved) == (dist.get_rank() == 0)
    else:
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
    other, resumed = build(layout, rule)
    copy_model(placed, other)
    with quiet():
        if not full:
            saved = get_optimizer_state_dict(other.model, resumed, options=options)
            content = {"optimizer": saved}
            dcp.load(content, checkpoint_id=folder)
            saved = content["optimizer"]
        set_optimizer_state_dict(other.model, resumed, saved, options=options)
    goes_on(placed, optimizer, other, resumed)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), ("hsdp", 4), ("tp_fsdp", 4)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.fast_cases("SUMO-fsdp-3-True", "NorMuon-fsdp-3-True")
def test_torchs_functions_carry_matrix_state(
    rule: str, layout: str, world: int, full: bool, tmp_path: Path
) -> None:
    harness.run(world, by_torch, layout, rule, full, str(tmp_path))


def saved_by(layout: str, rule: str, folder: str) -> dict[str, torch.Tensor]:
    placed, optimizer = build(layout, rule)
    train(placed, optimizer, 0, FIRST)
    dcp.save(
        {"o": get_optimizer_state_dict(placed.model, optimizer), "m": placed.model.state_dict()},
        checkpoint_id=folder,
    )
    train(placed, optimizer, FIRST, LAST)
    return placed.full()


def resumed_by(layout: str, rule: str, folder: str) -> dict[str, torch.Tensor]:
    placed, optimizer = build(layout, rule)
    with quiet():
        content = {
            "o": get_optimizer_state_dict(placed.model, optimizer),
            "m": placed.model.state_dict(),
        }
        dcp.load(content, checkpoint_id=folder)
        placed.model.load_state_dict(content["m"])
        set_optimizer_state_dict(placed.model, optimizer, content["o"])
    train(placed, optimizer, FIRST, LAST)
    return placed.full()


@pytest.mark.parametrize("rule", ["SUMO", "NorMuon"])
def test_another_number_of_ranks_resumes(rule: str, tmp_path: Path) -> None:
    wanted = harness.run(3, saved_by, "fsdp", rule, str(tmp_path))[0]
    for name, value in harness.run(2, resumed_by, "fsdp", rule, str(tmp_path))[0].items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def by_rank_0(rule: str, folder: str) -> None:
    """Save as Hugging Face's Trainer does under DistributedDataParallel."""
    placed, optimizer = build("ddp", rule)
    train(placed, optimizer, 0, FIRST)
    with pytest.raises(ValueError, match="consolidate_state_dict"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict()
    file = f"{folder}/optimizer.pt"
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), file)
    dist.barrier()
    other, resumed = build("ddp", rule)
    copy_model(placed, other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    goes_on(placed, optimizer, other, resumed)
    with pytest.raises(ValueError, match="consolidate_state_dict"):
        optimizer.state_dict()  # steps have been taken since


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.fast_cases("SUMO", "NorMuon")
def test_rank_0_saves_what_was_consolidated(rule: str, tmp_path: Path) -> None:
    harness.run(2, by_rank_0, rule, str(tmp_path))


def consolidated(rule: str) -> dict[str, torch.Tensor]:
    placed, optimizer = build("ddp", rule)
    train(placed, optimizer, 0, FIRST)
    optimizer.consolidate_state_dict()
    return {
        f"{i} {name}": value
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


@pytest.mark.parametrize("rule", ["SUMO", "NorMuon", "Muon"])
def test_what_is_consolidated_is_what_one_process_has(rule: str) -> None:
    wanted = harness.run(1, consolidated, rule)[0]
    for states in harness.run(2, consolidated, rule):
        assert states.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(states[name], value, rtol=1e-4, atol=2e-5)
