"""Under every layout of plain torch, the numbers of one process."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import spectral_dist
from tests.distributed.torch import layouts
from tests.reference import rules, training
from tests.support import harness
from tests.support.weights import Weights

STEPS = 10
SCALARS = {"weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
# the learning rates are such that a step moves a matrix by 1 to 3 in a hundred
MUON = {"lr": 0.02, **SCALARS}
POLARGRAD = {"lr": 0.1, **SCALARS}

Setting = dict[str, Any]
"""optimizer, its options; split, clip, accumulation (any number: what divides the batch)"""
EVERYWHERE: dict[str, Setting] = {
    "muon": {"optimizer": "Muon", "options": MUON},
    "polargrad": {"optimizer": "PolarGrad", "options": POLARGRAD, "clip": 1.0},
    "polargrad, polar first": {
        "optimizer": "PolarGrad", "options": {**POLARGRAD, "polar_first": True},
        "split": {"qkv": 3}, "accumulation": True,
    },
    "root": {"optimizer": "ROOT", "options": MUON, "split": {"qkv": 3}},
}  # fmt: skip
SOMEWHERE: dict[str, Setting] = {
    "muon, split, clipped, accumulated, small buckets": {
        "optimizer": "Muon", "options": {**MUON, "bucket_mb": 0.004}, "split": {"qkv": 3},
        "clip": 1.0, "accumulation": True,
    },
    "muon, plain momentum, svd": {
        "optimizer": "Muon",
        "options": {**MUON, "nesterov": False, "polar": "svd", "scale": "original"},
    },
    "polargrad, jordan": {"optimizer": "PolarGrad", "options": {**POLARGRAD, "polar": "jordan"}},
    "polargrad, polar_express, root of nu": {
        "optimizer": "PolarGrad",
        "options": {**POLARGRAD, "polar": "polar_express", "nu_power": 0.5},
    },
    "polargrad, svd": {"optimizer": "PolarGrad", "options": {**POLARGRAD, "polar": "svd"}},
    "polargrad, zolo": {"optimizer": "PolarGrad", "options": {**POLARGRAD, "polar": "zolo"}},
    "polargrad, polar first, jordan, clipped": {
        "optimizer": "PolarGrad", "options": {**POLARGRAD, "polar_first": True, "polar": "jordan"},
        "clip": 1.0,
    },
    "root, quantile .7, plain momentum, accumulated": {
        "optimizer": "ROOT", "options": {**MUON, "quantile": 0.7, "nesterov": False},
        "accumulation": True,
    },
}  # fmt: skip
ADAPTING = "root, adapting"
"""Its coefficients come out of the spectra on all ranks, so it has no reference but one process."""
SETTINGS = {
    **EVERYWHERE, **SOMEWHERE,
    ADAPTING: {"optimizer": "ROOT", "options": {**MUON, "adapt_every": 3}, "split": {"qkv": 3}},
}  # fmt: skip
ACCUMULATION = {1: 3, 2: 3, 3: 2, 4: 3}  # micro-batches a rank, of 12 sequences over so many
FULL_PRECISION = [
    (layout, world)
    for layout, (_, worlds) in layouts.LAYOUTS.items()
    for world in worlds
    if layout not in ("one", "fsdp_mixed") and not layout.endswith("_bf16")
]
IN_HALF = [(f"{layout}_bf16", n) for layout, worlds in layouts.HALF.items() for n in worlds]
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the table of matrices and the warning of the weight that has no gradient."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(nowhere):
            yield


def optimizer_for(model: nn.Module, setting: Setting, **changes: Any) -> Any:
    groups = spectral_dist.param_groups(model, split=setting.get("split"))
    make = getattr(spectral_dist, setting["optimizer"])
    return make(groups, **{**setting["options"], **changes})


def momentum(optimizer: Any) -> tuple[int, set[torch.dtype]]:
    """(elements of matrix momentum on this rank, each storage once; their dtypes)."""
    storages, dtypes = {}, set()
    for state in optimizer.state.values():
        value = state.get("exp_avg")
        if value is None or "exp_avg_sq" in state:
            continue
        value = value.to_local() if isinstance(value, DTensor) else value
        dtypes.add(value.dtype)
        storage = value.untyped_storage()
        storages[storage.data_ptr() or id(value)] = storage.nbytes() // value.element_size()
    for part in optimizer.matrix_parts():
        if part.name == "moment":
            dtypes.add(part.values.dtype)
            storages[part.matrix] = part.values.numel()
    return sum(storages.values()), dtypes


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
def test_settings_equal_the_reference(layout: str, world: int, setting: str) -> None:
    check_against_reference(layout, world, setting)


@pytest.mark.parametrize("setting", EVERYWHERE)
def test_bfloat16_compute_stays_near_the_float32_run(setting: str) -> None:
    """FSDP2's mixed precision: float32 shards, whose gradients come from bfloat16."""
    wanted, start = reference(setting, True), layouts.conditioned().state_dict()
    found = harness.run(2, train, "fsdp_mixed", SETTINGS[setting])[0]["parameters"]
    for name in wanted:
        if training.is_matrix(name) and name != "unused.weight":
            moved = (wanted[name] - start[name]).norm()
            assert (found[name] - wanted[name]).norm() < 0.15 * moved, name


# -- bitwise, given equal gradients


def give(
    step: int,
    placed: layouts.Laid,
    factor: float = 1.0,
    partial: bool = False,
    every: bool = False,
    own: bool = False,
) -> None:
    """Random gradients that depend on the step and the name only; unused's comes late."""
    generator = torch.Generator().manual_seed(500 + step)
    for name, p in placed.named.items():
        whole = getattr(getattr(p, "_st_info", p), "shape", p.shape)
        g = torch.randn(whole, generator=generator) * factor
        if name == "experts" and own:
            g += 0.1 * dist.get_rank()
        missing = name == "unused.weight" and step < 2 and not every
        placed.give(name, None if missing else g, partial)


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
@pytest.mark.fast_cases("fsdp-3")
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
