"""Under every layout of plain torch, the numbers of one process."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import spectral_dist
from tests.distributed.torch import layouts
from tests.distributed.torch.training_settings import (
    EVERYWHERE,
    FULL_PRECISION,
    SETTINGS,
    SOMEWHERE,
    Setting,
    give,
    momentum,
    optimizer_for,
)
from tests.reference import rules, training
from tests.support import harness
from tests.support.quiet import quiet

STEPS = 10
ACCUMULATION = {1: 3, 2: 3, 3: 2, 4: 3}  # micro-batches a rank, of 12 sequences over so many
BESIDES = ("fsdp_columns", "replicate", "replicate_tp", "tp_sequence_fsdp")
"""Layouts that nobody has asked for"""
AGAIN = [("ddp", 4), ("fsdp", 2), ("fsdp", 4)]
"""Layouts on other numbers of ranks than where they meet every setting"""
FEWER = ("muon", "polargrad, polar first")
"""The settings that are enough for both: see bitwise, too"""
MATRICES = {True: 2 * 4 + 3 + 1, False: 2 * 4}
"""Matrices of the model with and without its odd parts; a split makes two more of each qkv."""


def slow_if(wanted: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * wanted


def matrices(layout: str, split: Any = None) -> int:
    return MATRICES[layouts.options_for(layout).get("odd", True)] + (2 * 2 if split else 0)


# -- the layouts themselves


def plain_sgd(layout: str, accumulation: int) -> float:
    """The largest difference to one process after three steps, gradients clipped."""
    placed = layouts.build(layout)
    alone = layouts.one(layouts.conditioned(**layouts.options_for(layout)))
    for step in range(3):
        for some, micro in ((placed, accumulation), (alone, 1)):
            some.backward(step, micro)
            some.clip(1.0)
            with torch.no_grad():
                for p in some.named.values():
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-0.5)
    wanted = alone.full()
    return max(float((w - wanted[name]).abs().max()) for name, w in placed.full().items())


@pytest.mark.parametrize(("layout", "world"), FULL_PRECISION)
@pytest.mark.fast_cases("ddp-2", "fsdp-3", "hsdp-4", "tp-2", "tp_fsdp-4", "tp_sequence-2")
def test_layouts_train_as_one_process(layout: str, world: int) -> None:
    """What is under test below is the optimizer, not these."""
    accumulation = ACCUMULATION[world]
    assert max(harness.run(world, plain_sgd, layout, accumulation)) < 1e-6


# -- against the reference


def train(layout: str, setting: Setting, count: int = STEPS) -> dict[str, Any]:
    placed = layouts.build(layout)
    with quiet():
        optimizer = optimizer_for(placed.model, setting)
        for step in range(count):
            placed.backward(step, setting.get("accumulation", 1))
            if "clip" in setting:
                placed.clip(setting["clip"])
            optimizer.step()
    return {
        "parameters": placed.full(),
        "polar_calls": optimizer.polar_calls,
        "momentum": momentum(optimizer),
    }


@functools.cache
def reference(setting: str, odd: bool) -> dict[str, Tensor]:
    chosen = SETTINGS[setting]
    rule = chosen["optimizer"].lower()
    default = {"muon": "jordan", "polargrad": "qdwh", "root": None}[rule]
    polar = chosen["options"].get("polar", default)
    return training.train(
        chosen["options"], STEPS, chosen.get("clip", 0.0), rule=rule,
        oracle=polar and rules.oracle(polar), split=chosen.get("split"), skip_missing=True,
        make=layouts.conditioned, tokens=layouts.tokens, odd=odd,
    )  # fmt: skip


def check_against_reference(layout: str, world: int, name: str) -> None:
    setting = dict(SETTINGS[name])
    if setting.pop("accumulation", False):
        setting["accumulation"] = ACCUMULATION[world]
    odd = layouts.options_for(layout).get("odd", True)
    wanted, start = reference(name, odd), layouts.conditioned(odd=odd).state_dict()
    results = harness.run(world, train, layout, setting)
    for result in results:
        found = result["parameters"]
        assert found.keys() == wanted.keys()
        for parameter, value in wanted.items():
            error = float((found[parameter] - value).abs().max())
            assert error < (1e-6 if training.is_matrix(parameter) else 1e-5), parameter
            assert torch.equal(found[parameter], results[0]["parameters"][parameter])
            still = parameter in ("frozen.weight", "unused.weight")
            assert torch.equal(found[parameter], start[parameter]) == still, parameter
    # each matrix on one rank, whoever else holds it
    calls = sum(result["polar_calls"] for result in results)
    assert calls == STEPS * matrices(layout, setting.get("split"))


@pytest.mark.parametrize(
    ("layout", "world", "setting"),
    [
        pytest.param(layout, world, setting, marks=slow_if(layout in BESIDES))
        for layout, world in FULL_PRECISION
        for setting in (FEWER if layout in BESIDES or (layout, world) in AGAIN else EVERYWHERE)
    ],
)
@pytest.mark.fast_cases(
    "ddp-2-muon",
    "ddp-2-polargrad",
    "ddp-2-root",
    "fsdp-3-muon",
    "fsdp-3-polargrad",
    "fsdp-3-root",
    "tp_fsdp-4-muon",
    "tp_fsdp-4-polargrad",
    "tp_fsdp-4-root",
    "fsdp-3-polargrad, polar first",
    "tp-2-muon",
    "hsdp-4-muon",
    "tp_sequence-2-muon",
)
def test_equals_the_reference(layout: str, world: int, setting: str) -> None:
    check_against_reference(layout, world, setting)


ORACLES = tuple(name for name in SOMEWHERE if "polar first" not in name and "polar" in
                SOMEWHERE[name]["options"])  # fmt: skip
"""Another polar factor, which an owner computes of a whole matrix whatever the layout"""
SHARDED = [("ddp", 2), ("fsdp", 3), ("tp_fsdp", 4)]


def some_layouts() -> list[tuple[str, int, str]]:
    """(layout, world, setting): one process and each layout; of the oracles, one layout each."""
    found = []
    for number, setting in enumerate(SOMEWHERE):
        chosen = [SHARDED[number % 3]] if setting in ORACLES else SHARDED
        found += [(*place, setting) for place in [("one", 1), *chosen]]
    return sorted(found, key=lambda case: case[1])


@pytest.mark.parametrize(("layout", "world", "setting"), some_layouts())
@pytest.mark.fast_cases(
    "tp_fsdp-4-root, quantile .7, plain momentum, accumulated",
    "fsdp-3-muon, split, clipped, accumulated, small buckets",
    "one-1-polargrad, jordan",
    "fsdp-3-root, quantile .7, plain momentum, accumulated",
)
def test_settings_equal_the_reference(layout: str, world: int, setting: str) -> None:
    check_against_reference(layout, world, setting)


@pytest.mark.parametrize("setting", EVERYWHERE)
@pytest.mark.fast_cases("muon", "polargrad, polar first")
def test_bfloat16_compute_stays_near_the_float32_run(setting: str) -> None:
    """FSDP2's mixed precision: float32 shards, whose gradients come from bfloat16."""
    wanted, start = reference(setting, True), layouts.conditioned().state_dict()
    found = harness.run(2, train, "fsdp_mixed", SETTINGS[setting])[0]["parameters"]
    for name in wanted:
        if training.is_matrix(name) and name != "unused.weight":
            moved = (wanted[name] - start[name]).norm()
            assert (found[name] - wanted[name]).norm() < 0.15 * moved, name


# -- PolarGrad is homogeneous


def scaled(layout: str, names: list[str], factor: float) -> list[str]:
    """Matrices from zero, gradients and their multiples: those that do not end as multiples."""
    wrong = []
    for name in names:
        ends = []
        for c in (1.0, factor):
            placed = layouts.build(layout)
            with torch.no_grad():
                for n, p in placed.named.items():
                    if training.is_matrix(n):
                        (p.to_local() if isinstance(p, DTensor) else p).zero_()
            with quiet():
                optimizer = optimizer_for(placed.model, SETTINGS[name])
                for step in range(3):
                    give(step, placed, c, every=True)
                    optimizer.step()
            ends.append({n: w for n, w in placed.full().items() if training.is_matrix(n)})
        for n, w in ends[0].items():
            other = ends[1][n] / factor
            error = float((other - w).norm() / w.norm())
            if not error <= (0.0 if math.log2(factor).is_integer() else 1e-5):
                wrong.append(f"{name}: {n} by {error:.1e}")
    return wrong


@pytest.mark.parametrize(("layout", "world"), FULL_PRECISION)
@pytest.mark.fast_cases("ddp-2", "fsdp-3", "tp_fsdp-4")
def test_polargrad_is_homogeneous(layout: str, world: int) -> None:
    """update(c G) = c update(G), bitwise for powers of two."""
    names = [name for name in EVERYWHERE if name.startswith("polargrad")]
    for wrong in harness.run(world, scaled, layout, names, 2.0**-10):
        assert wrong == []


def test_polargrad_is_homogeneous_for_any_factor() -> None:
    names = [name for name in SETTINGS if "polargrad" in name and "root of nu" not in name]
    for wrong in harness.run(2, scaled, "fsdp", names, 300.0):
        assert wrong == []


# -- the model may be handed over wrapped or not


def unwrapped(layout: str) -> list[str]:
    """Parameters that differ from the wrapped model's when the model inside is handed over."""
    results = []
    for inner in (False, True):
        placed = layouts.build(layout)
        with quiet():
            model = placed.model.module if inner else placed.model
            given = {"process_group": dist.group.WORLD} if inner else {}
            optimizer = optimizer_for(model, SETTINGS["muon"], **given)
            for step in range(2):
                give(step, placed)
                optimizer.step()
        results.append(placed.full())
    return [n for n, w in results[0].items() if not torch.equal(w, results[1][n])]


def test_a_process_group_says_what_the_wrapper_does() -> None:
    assert harness.run(2, unwrapped, "ddp") == [[], []]


def wrapped_tiles() -> str:
    model = layouts.build("ddp_tp").model
    try:
        spectral_dist.param_groups(model)
    except ValueError as error:
        return str(error)
    return "no error"


def test_tiles_that_ddp_made_of_dtensors_are_refused() -> None:
    """It replaces them by plain local tensors, each of which would look like a whole matrix."""
    for text in harness.run(4, wrapped_tiles):
        assert "is a tile that DistributedDataParallel has made of a DTensor" in text
        assert "fully_shard" in text
