"""Given equal gradients, every layout has the bits of one process; and what that costs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.torch import layouts
from tests.distributed.torch.training_settings import (
    ADAPTING,
    EVERYWHERE,
    FULL_PRECISION,
    SETTINGS,
    give,
    momentum,
    optimizer_for,
)
from tests.reference import training
from tests.support import harness
from tests.support.quiet import quiet
from tests.support.weights import Weights

IN_HALF = [(f"{layout}_bf16", n) for layout, worlds in layouts.HALF.items() for n in worlds]


# -- bitwise, given equal gradients


def stage() -> nn.Module:
    """Another model on ranks 2 and 3 than on 0 and 1."""
    number = dist.get_rank() // 2
    return layouts.conditioned(seed=number, layers=1 + number)


def experts_of_ones_own() -> nn.Module:
    """Plain parameters need not be copies of each other."""
    model = layouts.conditioned()
    with torch.no_grad():
        model.experts += 0.01 * dist.get_rank()
    return model


MODELS = {
    "language model": layouts.conditioned,
    "one matrix": functools.partial(Weights, only=(5, 6)),
    "more ranks than rows": functools.partial(Weights, a=(2, 7), b=(9, 4), c=(1, 5), d=(3, 3)),
    "equal matrices": functools.partial(Weights, **{f"w{i}": (48, 24) for i in range(24)}),
    "stage": stage,
    "experts of one's own": experts_of_ones_own,
}


def different(layout: str, names: list[str], model: str) -> dict[str, Any]:
    """After four steps, by setting: parameters with other bits than in one process, and counts."""
    result: dict[str, Any] = {}
    for name in names:
        setting = SETTINGS[name]
        make = MODELS[model]
        placed = layouts.build(layout, make)
        options = layouts.options_for(layout) if make is layouts.conditioned else {}
        plain = make(**options)
        alone = layouts.one(plain.bfloat16() if layout.endswith("_bf16") else plain)
        alone.places = {n: torch.arange(p.numel()) for n, p in alone.named.items()}
        if make.__class__ is functools.partial:  # no qkv
            setting = {**setting, "split": None}
        with quiet():
            first, second = (optimizer_for(x.model, setting) for x in (alone, placed))
            for step in range(4):
                own = make is experts_of_ones_own
                give(step, alone, own=own)
                give(step, placed, partial=layout.startswith("tp") and step % 2 == 1, own=own)
                first.step()
                second.step()
        a, b = alone.full(), placed.full()
        result[name] = {
            "different": [n for n in a if not torch.equal(a[n], b[n])],
            "calls": (first.polar_calls, second.polar_calls),
            "momentum": momentum(second),
            "bytes": dict(second.meter.bytes),
            "coefficients": [g.get("coefficients") for g in second.param_groups],
        }
    return result


def check_bitwise(world: int, layout: str, names: list[str], model: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = harness.run(world, different, layout, names, model)
    for name in names:
        for result in results:
            assert result[name]["different"] == [], name
            assert result[name]["momentum"][1] <= {torch.float32}
        alone = results[0][name]["calls"][0]
        assert sum(result[name]["calls"][1] for result in results) == alone, name
    return results


@pytest.mark.parametrize(("layout", "world"), [*FULL_PRECISION, *IN_HALF])
@pytest.mark.fast_cases(
    "ddp-2",
    "fsdp-3",
    "fsdp_columns-2",
    "hsdp-4",
    "tp-2",
    "tp_fsdp-4",
    "tp_sequence-2",
    "fsdp_bf16-3",
    "tp_bf16-2",
)
def test_bitwise_equal_to_one_process(layout: str, world: int) -> None:
    """The owner strategy moves numbers and changes none."""
    check_bitwise(world, layout, list(EVERYWHERE), "language model")


@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("fsdp", 3), ("hsdp", 4)])
@pytest.mark.slow
def test_adapted_coefficients_are_those_of_one_process(layout: str, world: int) -> None:
    """Counts of singular values add up to the same whoever counts them."""
    results = check_bitwise(world, layout, ["root", ADAPTING], "language model")
    adapted, still = results[0][ADAPTING]["coefficients"], results[0]["root"]["coefficients"]
    assert all(result[ADAPTING]["coefficients"] == adapted for result in results)
    assert adapted != still


@pytest.mark.parametrize(
    ("layout", "world"), [("ddp", 4), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("replicate", 2)]
)
@pytest.mark.parametrize("model", ["one matrix", "more ranks than rows"])
@pytest.mark.fast_cases(
    "one matrix-ddp-4",
    "one matrix-fsdp-3",
    "more ranks than rows-fsdp-4",
    "more ranks than rows-hsdp-4",
)
def test_little_to_share(layout: str, world: int, model: str) -> None:
    """Ranks without a row, or without a matrix to orthogonalize."""
    results = check_bitwise(world, layout, list(EVERYWHERE), model)
    if model == "one matrix":
        calls = sorted(result["muon"]["calls"][1] for result in results)
        assert calls == [0] * (world - 1) + [4]


def test_ranks_with_other_models() -> None:
    """Each pair takes its steps by itself: nothing is asked of, or counted with, the other pair."""
    results = harness.run(4, different, "stages", list(EVERYWHERE), "stage")
    for name in EVERYWHERE:
        assert [result[name]["different"] for result in results] == [[]] * 4, name
        for pair in (results[:2], results[2:]):
            alone = pair[0][name]["calls"][0]
            assert sum(result[name]["calls"][1] for result in pair) == alone, name
    assert results[0]["muon"]["calls"][0] < results[2]["muon"]["calls"][0]


def test_plain_parameters_that_are_no_copies() -> None:
    results = harness.run(2, different, "tp", list(EVERYWHERE), "experts of one's own")
    for name in EVERYWHERE:
        assert [result[name]["different"] for result in results] == [[]] * 2, name
        alone = results[0][name]["calls"][0]
        assert sum(result[name]["calls"][1] for result in results) == alone + 4 * 3, name


# -- what it costs

NUMBERS = 24 * 48 * 24  # in the equal matrices, which divide evenly over 2, 3 and 4 ranks


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.fast_cases("3")
def test_fsdp_sends_each_shard_there_and_back(world: int) -> None:
    """2 w N / P numbers a step, w = (P - 1) / P, in float32, besides the finite check."""
    wanted = 2 * (world - 1) / world * NUMBERS / world * 4
    for result in check_bitwise(world, "fsdp", list(EVERYWHERE), "equal matrices"):
        for name in EVERYWHERE:
            sent = result[name]["bytes"]
            assert sent["all_to_all"] / 4 == pytest.approx(wanted, rel=0.02), name
            rest = sum(v for k, v in sent.items() if k != "all_to_all") / 4
            assert rest < 0.02 * wanted, name
            assert result[name]["calls"][1] == 4 * 24 / world
            assert result[name]["momentum"][0] == NUMBERS / world


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.fast_cases("2")
def test_ddp_gathers_directions_and_keeps_momentum_once(world: int) -> None:
    wanted = (world - 1) / world * NUMBERS * 4
    results = check_bitwise(world, "ddp", list(EVERYWHERE), "equal matrices")
    for name in EVERYWHERE:
        for result in results:
            sent = result[name]["bytes"]
            assert sent["all_gather"] / 4 == pytest.approx(wanted, rel=0.02), name
            assert sum(v for k, v in sent.items() if k != "all_gather") / 4 < 0.02 * wanted, name
        assert sum(result[name]["momentum"][0] for result in results) == NUMBERS, name


def trained_momentum(layout: str, **changes: Any) -> tuple[int, int]:
    """(elements of matrix momentum on this rank, numbers in matrices) after two steps."""
    placed = layouts.build(layout)
    with quiet():
        optimizer = optimizer_for(placed.model, SETTINGS["muon"], **changes)
        for step in range(2):
            give(step, placed, every=True)
            optimizer.step()
    numbers = sum(p.numel() for n, p in placed.named.items() if training.is_matrix(n))
    return momentum(optimizer)[0], numbers


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_momentum_of_a_model_is_kept_once(world: int) -> None:
    """A stack of experts among it, whose matrices have several owners."""
    results = harness.run(world, trained_momentum, "ddp")
    assert sum(kept for kept, _ in results) == results[0][1]
    assert max(kept for kept, _ in results) < results[0][1]
    everywhere = harness.run(world, trained_momentum, "ddp", replicate_momentum=True)
    assert [kept for kept, _ in everywhere] == [results[0][1]] * world
