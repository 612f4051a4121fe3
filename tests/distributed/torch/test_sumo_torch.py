"""SUMO under every layout of plain torch: the numbers of one process, its state once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import spectral_dist
from tests.distributed.torch import layouts
from tests.distributed.torch.sumo_runs import OPTIONS, SETTINGS, alone, train, train_by_products
from tests.distributed.torch.training_settings import give
from tests.reference import training
from tests.support import harness
from tests.support.quiet import quiet
from tests.support.weights import Weights

CASES = [
    ("ddp", 2, "paper"), ("ddp", 3, "full"), ("ddp", 4, "subspace"),
    ("fsdp", 2, "gram"), ("fsdp", 3, "subspace"), ("fsdp", 4, "criterion"),
    ("fsdp", 3, "gram, full"), ("hsdp", 4, "gram"),
    ("tp", 2, "paper"), ("tp", 2, "gram, criterion"), ("tp_sequence", 2, "subspace"),
    ("tp_fsdp", 4, "paper"), ("tp_fsdp", 4, "gram"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("fsdp", 2, "paper"), ("fsdp", 2, "small buckets"), ("fsdp", 3, "full"),
            ("fsdp", 4, "gram, subspace, svd"), ("hsdp", 4, "paper"), ("tp", 2, "gram"),
            ("tp", 2, "gram, subspace, svd"), ("tp_fsdp", 4, "gram, full"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "world", "setting"), CASES)
@pytest.mark.fast_cases("tp-2-gram, criterion", "ddp-3-full")
def test_equals_one_process(layout: str, world: int, setting: str) -> None:
    odd = layouts.options_for(layout).get("odd", True)
    wanted = alone(setting, odd)
    results = harness.run(world, train, layout, SETTINGS[setting], odd)
    for name, value in wanted["parameters"].items():
        for result in results:
            error = float((result["parameters"][name] - value).abs().max())
            assert error < (1e-6 if training.is_matrix(name) else 1e-5), (name, error)
    # each element of the state on one rank
    count: dict[tuple[str, str], int] = {}
    for result in results:
        assert result["shard state"] == {"step"}
        for matrix, name, _, numel, speaks in result["parts"]:
            count[matrix, name] = count.get((matrix, name), 0) + numel * speaks
    assert count == {
        (matrix, name): torch.Size(shape).numel() for matrix, name, shape, _, _ in wanted["parts"]
    }
    for result in results:
        for matrix, times in result["refreshed"].items():
            assert times == wanted["refreshed"][matrix]
            assert times >= 3 or "unused" in matrix
    if "full" not in setting:
        assert sum(result["polar_calls"] for result in results) == wanted["polar_calls"]


@pytest.mark.parametrize(
    ("layout", "setting"),
    [
        ("fsdp", "gram"),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("tp", "gram, full"),)),
    ],
)
def test_in_slabs_by_products_it_equals_one_process(layout: str, setting: str) -> None:
    """Steps by products equal one process, also where matrices have no gradient at first."""
    odd = layouts.options_for(layout).get("odd", True)
    options = {k: v for k, v in SETTINGS[setting].items() if k != "strategy"}
    wanted = train_by_products("one", options, odd)
    for result in harness.run(2, train_by_products, layout, SETTINGS[setting], odd):
        assert result["refreshed"].items() <= wanted["refreshed"].items()
        for name, value in wanted["parameters"].items():
            error = float((result["parameters"][name] - value).abs().max())
            assert error < (1e-6 if training.is_matrix(name) else 1e-5), (name, error)


def given(layout: str, options: dict[str, Any]) -> list[str]:
    """Parameters with other bits than in one process, after 12 steps on equal gradients."""
    placed, plain = layouts.build(layout), layouts.one(layouts.conditioned())
    plain.places = {n: torch.arange(p.numel()) for n, p in plain.named.items()}
    with quiet():
        both = [
            spectral_dist.SUMO(
                spectral_dist.param_groups(x.model, split={"qkv": 3}), **{**OPTIONS, **options}
            )
            for x in (placed, plain)
        ]
        for step in range(12):
            give(step, placed)
            give(step, plain)
            for optimizer in both:
                optimizer.step()
    wanted = plain.full()
    return [n for n, value in placed.full().items() if not torch.equal(value, wanted[n])]


@pytest.mark.parametrize(
    ("layout", "world", "setting"),
    [
        ("ddp", 4, "paper"), ("fsdp", 3, "subspace"), ("fsdp", 4, "small buckets"),
        ("tp_fsdp", 4, "criterion"), ("tp", 2, "full"),
    ],
)  # fmt: skip
@pytest.mark.fast_cases("fsdp-4-small buckets", "tp_fsdp-4-criterion")
def test_bitwise_with_equal_gradients(layout: str, world: int, setting: str) -> None:
    """Owners compute what one process does, bit by bit; a parameter without gradient is in it."""
    for different in harness.run(world, given, layout, SETTINGS[setting]):
        assert different == []


def sent(strategy: str, rank: int) -> list[dict[str, int]]:
    """Bytes that this rank sends in a step with a refresh, and in one without."""
    placed = layouts.build("fsdp", functools.partial(Weights, **dict.fromkeys("abcd", (48, 24))))
    with quiet():
        groups = spectral_dist.param_groups(placed.model)
        optimizer = spectral_dist.SUMO(
            groups, rank=rank, perp_scale=0.0, limiter=0.0, strategy=strategy, check_finite=False
        )
        found = []
        for step in range(2):
            give(step, placed)
            before = dict(optimizer.meter.bytes)
            optimizer.step()
            now = {k: v - before.get(k, 0) for k, v in optimizer.meter.bytes.items()}
            found.append({k: v for k, v in now.items() if v})
    return found


def test_bytes_of_a_step() -> None:
    """Owners get all of their matrices; in slabs only r x n of each travels, there and back."""
    m, n, r, ranks = 48, 24, 5, 2
    others = (ranks - 1) / ranks
    for first, second in harness.run(ranks, sent, "owner", r):
        assert first == second == {"all_to_all": 4 * 2 * others * 4 * m * n / ranks}
    for first, second in harness.run(ranks, sent, "gram", r):
        half = 4 * others * 4 * r * n
        assert second == {"all_to_all": half, "all_gather": half}
        # sketches of c columns: c x n twice there and back, their c x c Grams in float64 (6), c x r
        c = r + 8
        there = 3 * 4 * c * n + 6 * 8 * c * c + 4 * r * r
        assert first["all_to_all"] == half + 4 * others * there
        back = 2 * 4 * c * n + 6 * 8 * c * c + 8 * c * r
        assert first["all_gather"] == half + 4 * others * back
