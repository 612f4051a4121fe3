"""NorMuon under the layouts of plain torch: one process's numbers, and v once, wherever it lies."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_dist
from tests.distributed.torch import layouts
from tests.distributed.torch.training_settings import give, momentum
from tests.reference import training
from tests.reference.normuon import NorMuonMatrices
from tests.support import harness
from tests.support.quiet import quiet

STEPS = 10
SPLIT = {"qkv": 3}
OPTIONS: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01,
}  # fmt: skip
SHAPES = [(24, 24)] * 8 + [(56, 24), (61, 24), (24, 56), (24, 61)] + [(24, 7)] * 3 + [(3, 24)]
"""Of the matrices of the model: parts of qkv and out, up, down, experts, the unused one."""
GRAM: dict[str, Any] = {"strategy": "gram"}

Values = dict[str, Tensor]


def make(placed: layouts.Laid, **options: Any) -> Any:
    groups = spectral_dist.param_groups(placed.model, split=SPLIT)
    return spectral_dist.NorMuon(groups, **{**OPTIONS, **options})


def held(optimizer: Any) -> list[tuple[str, tuple[int, ...], Tensor, bool]]:
    """(matrix, offsets, values, whether to be saved) of all of v that is on this rank."""
    return [(p.matrix, p.offsets, p.values.clone(), p.is_primary) for p in optimizer.matrix_parts()]


def train(
    layout: str, options: dict[str, Any], first: int = 0, last: int = STEPS, load: str = "",
    save: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Steps [first, last) of a run, from checkpoint ``load`` to ``save``; '' is none."""
    # other weights if they are to be loaded
    placed = layouts.build(layout, **({"seed": 1} if load else {}))
    with quiet():
        optimizer = make(placed, **options)
        if load:
            spectral_dist.checkpoint.load(load, placed.model, optimizer)
        loaded = held(optimizer) if load else []
        for step in range(first, last):
            placed.backward(step)
            optimizer.step()
        if save:
            spectral_dist.checkpoint.save(save, placed.model, optimizer)
    plans = [unit.plan for unit in optimizer.all_units if hasattr(unit, "plan")]
    strategies = {strategy for plan in plans for strategy in plan.strategies}
    return {
        "parameters": placed.full(), "momentum": momentum(optimizer), "v": held(optimizer),
        "loaded": loaded, "polar_calls": optimizer.polar_calls, "strategies": strategies,
    }  # fmt: skip


@functools.cache
def alone(last: int = STEPS) -> dict[str, Any]:
    return train("one", {}, last=last)


def whole(results: list[dict[str, Any]], key: str = "v") -> Values:
    """v of every matrix, put together; ranks that hold the same part hold the same bits."""
    shapes = {name: values.shape for name, _, values, _ in alone()["v"]}
    found = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    saved = dict.fromkeys(shapes, 0)
    for result in results:
        for name, (row, _), values, is_primary in result[key]:
            place = found[name][row : row + len(values)]
            assert torch.equal(place, values) or place.isnan().all(), name
            place.copy_(values)
            saved[name] += len(values) * is_primary
    assert saved == {name: len(v) for name, v in found.items()}  # every element once
    return found


def near(found: Values, wanted: Values, scalars: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = float((found[name] - value).abs().max())
        assert error < (2e-6 if training.is_matrix(name) else scalars), (name, error)


@pytest.mark.parametrize(
    ("layout", "world", "options"),
    [
        ("ddp", 3, {"replicate_momentum": True}), ("fsdp", 3, GRAM), ("hsdp", 4, {}),
        ("tp", 2, GRAM),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ddp", 2, {}), ("fsdp", 2, {}), ("tp", 2, {"strategy": "owner"}),
                ("ddp", 3, {}), ("fsdp", 2, GRAM), ("fsdp", 3, {}), ("hsdp", 4, GRAM),
                ("tp_fsdp", 4, GRAM), ("tp_fsdp", 4, {}), ("fsdp", 2, {"bucket_mb": 0.004}),
            )
        ),
    ],
)  # fmt: skip
def test_equals_one_process(layout: str, world: int, options: dict[str, Any]) -> None:
    results = harness.run(world, train, layout, options)
    for result in results:
        near(result["parameters"], alone()["parameters"])
    v = whole(results)
    for name, _, values, _ in alone()["v"]:
        torch.testing.assert_close(v[name], values, rtol=1e-4, atol=1e-7, msg=name)
    calls = sum(result["polar_calls"] for result in results)
    assert calls == alone()["polar_calls"] == STEPS * len(SHAPES)
    strategies = set.union(*(result["strategies"] for result in results))
    assert ("gram" in strategies) == (options.get("strategy") == "gram")


def test_one_process_equals_the_reference() -> None:
    """Which the layouts are compared with."""
    wanted = training.train(
        OPTIONS, STEPS, take=NorMuonMatrices(), split=SPLIT, skip_missing=True,
        make=layouts.conditioned, tokens=layouts.tokens,
    )  # fmt: skip
    near(alone()["parameters"], wanted)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.fast_cases("3-ddp", "3-fsdp")
def test_state_is_kept_once(layout: str, world: int) -> None:
    """4 bytes each of m n of momentum and m of v, over all ranks; under DDP at owners alone."""
    results = harness.run(world, train, layout, {}, 0, 1)
    numbers, rows = sum(m * n for m, n in SHAPES), sum(m for m, _ in SHAPES)
    momenta = [result["momentum"] for result in results]
    assert {dtype for _, dtypes in momenta for dtype in dtypes} == {torch.float32}
    # FSDP2 pads what does not divide
    assert sum(count for count, _ in momenta) == numbers
    v = [values for result in results for *_, values, _ in result["v"]]
    assert sum(values.nbytes for values in v) == 4 * rows
    if layout == "ddp":
        assert max(count for count, _ in momenta) < 0.8 * numbers
        names = [{name for name, *_ in result["v"]} for result in results]
        assert sum(map(len, names)) == len(set.union(*names)) == len(SHAPES)


def given(layout: str, options: dict[str, Any]) -> list[str]:
    """Parameters with other bits than in one process, after 6 steps on equal gradients."""
    placed, plain = layouts.build(layout), layouts.one(layouts.conditioned())
    plain.places = {n: torch.arange(p.numel()) for n, p in plain.named.items()}
    with quiet():
        both = [make(x, **options) for x in (placed, plain)]
        for step in range(6):
            for x, optimizer in zip((placed, plain), both, strict=True):
                give(step, x)
                optimizer.step()
    wanted = plain.full()
    return [n for n, value in placed.full().items() if not torch.equal(value, wanted[n])]


@pytest.mark.parametrize(("layout", "world"), [("ddp", 3), ("fsdp", 2), ("tp", 2)])
def test_bitwise_with_equal_gradients(layout: str, world: int) -> None:
    """Owners compute what one process does; a parameter without gradient is in it."""
    for different in harness.run(world, given, layout, {"strategy": "owner"}):
        assert different == []


# -- saved under one layout, taken up under another


@pytest.mark.parametrize(
    "way",
    [
        [("tp", 2, GRAM), ("one", 1, {}), ("tp", 2, GRAM)],
        [("fsdp", 2, {}), ("one", 1, {}), ("fsdp", 2, GRAM)],
        pytest.param([("ddp", 3, {}), ("tp", 2, GRAM), ("hsdp", 4, {})], marks=pytest.mark.slow),
        pytest.param([("hsdp", 4, GRAM), ("ddp", 2, {}), ("fsdp", 3, GRAM)],
                     marks=pytest.mark.slow),
    ],
    ids=lambda way: " ".join(layout for layout, *_ in way),
)  # fmt: skip
def test_resharding_keeps_v(way: list[Any], tmp_path: Path) -> None:
    """Every bit of it; and the run is that which never stopped."""
    steps, load = (0, 3, 6, STEPS), ""
    before: list[dict[str, Any]] = []
    for number, (layout, world, options) in enumerate(way):
        save = str(tmp_path / str(number))
        arguments = (layout, options, *steps[number : number + 2], load, save)
        results = harness.run(world, train, *arguments) if world > 1 else [train(*arguments)]
        if before:
            saved, loaded = whole(before), whole(results, "loaded")
            assert all(torch.equal(loaded[name], v) for name, v in saved.items())
            assert all(v.any() for name, v in saved.items() if name != "unused.weight")
        if layout == "tp" and options is GRAM:  # by rows v is cut, by columns it is everywhere
            for name, cut in (("layers.0.up.weight", True), ("layers.0.down.weight", False)):
                lengths = [len(v) for r in results for matrix, _, v, _ in r["v"] if matrix == name]
                assert lengths == ([28, 28] if cut else [24, 24])
        before, load = results, save
    for result in before:
        near(result["parameters"], alone()["parameters"])
