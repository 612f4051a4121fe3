"""A run that stops and goes on in another layout of plain torch equals the one that never stopped.

The functions that take a ``folder`` run on every rank, through the harness or in this process.
"""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import spectral_dist
from spectral_dist import checkpoint
from tests.distributed.torch import layouts
from tests.distributed.torch.checkpoint_legs import RULES, leg, same, start, states, take_steps
from tests.support import harness
from tests.support.quiet import quiet

MOMENTA = 10
"""Matrix parameters, the stack of experts and the unused one among them."""


def legs(world: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """``leg`` on that many ranks: the mean of their losses, and what else the first one has."""
    results = [leg(*args, **kwargs)] if world == 1 else harness.run(world, leg, *args, **kwargs)
    means = [sum(losses) / world for losses in zip(*(r["losses"] for r in results), strict=True)]
    return {**results[0], "losses": means}


@functools.cache
def uninterrupted(rule: str) -> list[dict[str, Any]]:
    """One process from start to end: its losses so far and parameters after each step."""
    placed, optimizer = start("one", rule)
    found: list[dict[str, Any]] = []
    for step in range(16):
        before = found[-1]["losses"] if found else []
        losses = before + take_steps(placed, optimizer, step, step + 1)
        found.append({"losses": losses, "parameters": placed.full()})
    return found


def check(rule: str, losses: list[float], parameters: dict[str, Tensor]) -> None:
    """Equal to the run that never stopped, from the first step to the last of ``losses``."""
    wanted = uninterrupted(rule)[len(losses) - 1]
    assert losses == pytest.approx(wanted["losses"], abs=1e-6, rel=0)
    assert parameters.keys() == wanted["parameters"].keys()
    for name, value in wanted["parameters"].items():
        assert float((parameters[name] - value).abs().max()) < 1e-6, name


# -- n ranks of one layout to m of another


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.fast_cases("root", "polar first")
def test_from_4_ranks_of_fsdp_to_3_of_ddp_and_one_process(rule: str, tmp_path: Path) -> None:
    """FSDP2's rows are uneven, and the stack of three experts leaves the fourth rank none."""
    before = legs(4, "fsdp", rule, 0, 4, save=str(tmp_path))
    for layout, world in (("ddp", 3), ("one", 1)):
        after = legs(world, layout, rule, 4, 14, load=str(tmp_path))
        check(rule, before["losses"] + after["losses"], after["parameters"])


CHAIN = [("fsdp", 4), ("hsdp", 4), ("tp", 2), ("tp_fsdp", 4), ("ddp", 2), ("one", 1), ("fsdp", 3)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.fast_cases("root")
def test_through_every_layout(rule: str, tmp_path: Path) -> None:
    losses: list[float] = []
    folder = ""
    for number, (layout, world) in enumerate(CHAIN):
        target = str(tmp_path / f"{number}")
        first = 2 * number
        found = legs(world, layout, rule, first, first + 2, load=folder, save=target)
        losses += found["losses"]
        folder = target
    check(rule, losses, found["parameters"])


@pytest.mark.parametrize(
    ("layout", "world"), [("ddp", 3), ("fsdp", 4), ("hsdp", 4), ("tp", 2), ("tp_fsdp", 4)]
)
def test_the_same_layout_loads_every_bit(layout: str, world: int, tmp_path: Path) -> None:
    saved = harness.run(world, leg, layout, "muon", 0, 2, save=str(tmp_path))
    loaded = harness.run(world, leg, layout, "muon", 2, 2, load=str(tmp_path))
    for before, after in zip(saved, loaded, strict=True):
        same(after["loaded"], before["states"])
        same({"": after["parameters"]}, {"": before["parameters"]})


def test_bfloat16_parameters_keep_float32_momentum(tmp_path: Path) -> None:
    saved = harness.run(3, leg, "fsdp_bf16", "muon", 0, 2, save=str(tmp_path))
    loaded = harness.run(3, leg, "fsdp_bf16", "muon", 2, 4, load=str(tmp_path))
    whole = harness.run(3, leg, "fsdp_bf16", "muon", 0, 4)
    for before, after, never in zip(saved, loaded, whole, strict=True):
        same(after["loaded"], before["states"])
        assert {v.dtype for s in after["loaded"].values() for v in s.values()} == {torch.float32}
        same({"": after["parameters"]}, {"": never["parameters"]})
        assert {p.dtype for p in after["parameters"].values()} == {torch.bfloat16}
        assert after["losses"] == never["losses"][2:]


# -- before the first step, options, extra


def keys(layout: str, folder: str) -> dict[str, Any]:
    """A new optimizer's keys, which no step has made; and what a load of its checkpoint gives."""
    placed, optimizer = start(layout)
    found = checkpoint.state_dict(optimizer)
    with quiet():
        checkpoint.save(folder, placed.model, optimizer)
        placed, optimizer = start(layout, seed=1)
        checkpoint.load(folder, placed.model, optimizer)
    losses = take_steps(placed, optimizer, 0, 2)
    return {
        "keys": {name: sorted(state) for name, state in found["state"].items()},
        "losses": losses, "parameters": placed.full(),
    }  # fmt: skip


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 4), ("ddp", 3), ("tp", 2), ("one", 1)])
def test_all_ranks_have_the_same_keys_before_the_first_step(
    layout: str, world: int, tmp_path: Path
) -> None:
    args = (layout, str(tmp_path))
    results = [keys(*args)] if world == 1 else harness.run(world, keys, *args)
    trained = {n for n, p in layouts.conditioned().named_parameters() if p.requires_grad}
    for result in results:
        assert result["keys"] == results[0]["keys"]
        assert result["keys"].keys() == trained
        assert list(result["keys"].values()).count(["exp_avg", "step"]) == MOMENTA
    means = [sum(x) / world for x in zip(*(r["losses"] for r in results), strict=True)]
    check("muon", means, results[0]["parameters"])


def scheduled(layout: str, folder: str, load: bool, count: int) -> dict[str, Any]:
    """With a schedule, whose state is ``extra``; the checkpoint decides the options."""
    changes = {"momentum": 0.8, "nesterov": False, "betas": (0.8, 0.9), "scalar_lr": 0.001}
    placed, optimizer = start(layout, **({} if load else changes))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8)
    first = 0
    if load:
        with quiet():
            extra = checkpoint.load(folder, placed.model, optimizer)
        schedule.load_state_dict(extra["schedule"])
        first = extra["step"]
    losses, lrs = [], []
    for step in range(first, first + count):
        lrs.append([group["lr"] * group["lr_ratio"] for group in optimizer.param_groups])
        losses += take_steps(placed, optimizer, step, step + 1)
        with quiet():
            schedule.step()
    if not load:
        extra = {"schedule": schedule.state_dict(), "step": first + count}
        with quiet():
            checkpoint.save(folder, placed.model, optimizer, **extra)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {"losses": losses, "lrs": lrs, "groups": groups, "parameters": placed.full()}


def test_options_and_schedules_come_back(tmp_path: Path) -> None:
    never = scheduled("one", str(tmp_path / "never"), False, 6)
    saved = harness.run(3, scheduled, "ddp", str(tmp_path / "a"), False, 3)[0]
    again = scheduled("one", str(tmp_path / "a"), True, 3)
    assert saved["lrs"] + again["lrs"] == never["lrs"]
    assert again["groups"] == never["groups"]
    assert again["groups"][0]["momentum"] == 0.8
    assert again["groups"][1]["betas"] == (0.8, 0.9)
    assert again["losses"] == pytest.approx(never["losses"][3:], abs=1e-6, rel=0)


def ranks_own_extra(folder: str) -> Any:
    placed, optimizer = start("ddp")
    numbers = torch.arange(3) + 7 * dist.get_rank()
    checkpoint.save(folder, placed.model, optimizer, rank=dist.get_rank(), numbers=numbers)
    extra = checkpoint.load(folder, placed.model, optimizer)
    return extra["rank"], extra["numbers"].tolist()


def test_extra_is_that_of_the_first_rank(tmp_path: Path) -> None:
    assert harness.run(3, ranks_own_extra, str(tmp_path)) == [(0, [0, 1, 2])] * 3


# -- state_dict() of torch's own


def whole_states(folder: str) -> None:
    """Where the owner alone keeps momentum, there is no state_dict; everywhere, there is."""
    placed, alone = start("ddp")
    take_steps(placed, alone, 0, 2)
    with pytest.raises(ValueError, match="replicate_momentum=True"):
        alone.state_dict()
    everywhere = start("ddp", replicate_momentum=True)
    take_steps(*everywhere, 0, 2)
    file = io.BytesIO()
    torch.save({"model": everywhere[0].model.state_dict(), "o": everywhere[1].state_dict()}, file)
    content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = start("ddp", seed=1)  # and each owner takes its part
    resumed[0].model.load_state_dict(content["model"])
    resumed[1].load_state_dict(content["o"])
    take_steps(placed, alone, 2, 4)
    take_steps(*resumed, 2, 4)
    same(states(resumed[1]), states(alone))
    checkpoint.save(folder, resumed[0].model, resumed[1])
    back = start("ddp", seed=2, replicate_momentum=True)
    checkpoint.load(folder, back[0].model, back[1])
    back[1].state_dict()
    take_steps(*everywhere, 2, 4)
    same(states(back[1]), states(everywhere[1]))


def test_state_dict_of_ddp(tmp_path: Path) -> None:
    harness.run(3, whole_states, str(tmp_path))


def by_torch(layout: str, rule: str) -> None:
    """torch.distributed.checkpoint.state_dict's own functions, on DTensors."""
    placed, optimizer = start(layout, rule)
    take_steps(placed, optimizer, 0, 2)
    # which are the optimizer's own tensors
    content = copy.deepcopy(get_optimizer_state_dict(placed.model, optimizer))
    other, resumed = start(layout, rule)
    other.model.load_state_dict(placed.model.state_dict())
    with quiet():
        set_optimizer_state_dict(other.model, resumed, content)
    same(states(resumed), states(optimizer))
    losses = take_steps(placed, optimizer, 2, 4), take_steps(other, resumed, 2, 4)
    assert losses[0] == losses[1]
    same({"": other.full()}, {"": placed.full()})


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), ("hsdp", 4)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.fast_cases("muon-fsdp-3", "muon-hsdp-4", "root-fsdp-3", "polar first-fsdp-3")
def test_torchs_own_functions(layout: str, world: int, rule: str) -> None:
    harness.run(world, by_torch, layout, rule)


# -- convolutions


def convolutions(layout: str, dims: int, folder: str) -> None:
    """In the layout: save, load, and every bit is there."""
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 3) if dims == 1 else nn.Conv2d(4, 6, 3)
    model: nn.Module = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 4**dims, 3))
    if layout == "fsdp":
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    with quiet():
        optimizers = [spectral_dist.Muon(spectral_dist.param_groups(model)) for _ in range(2)]
        model(torch.randn(2, 4, *[6] * dims)).square().sum().backward()
        optimizers[0].step()
        checkpoint.save(folder, model, optimizers[0])
        checkpoint.load(folder, model, optimizers[1])
    same(*map(states, optimizers))


@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        ("ddp", 2), ("fsdp", 2),
        ("ddp", 1),
        ("fsdp", 1),
    ],
)  # fmt: skip
def test_convolutions(layout: str, dims: int, tmp_path: Path) -> None:
    harness.run(2, convolutions, layout, dims, str(tmp_path))
