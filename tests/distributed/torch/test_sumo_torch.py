"""SUMO under every layout of plain torch: the numbers of one process, its state once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_dist
from tests.distributed.torch import layouts
from tests.distributed.torch.training_settings import give
from tests.reference import training
from tests.support import harness
from tests.support.quiet import quiet
from tests.support.weights import Weights

STEPS = 20
OPTIONS: dict[str, Any] = {
    "lr": 0.01, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01,
    "rank": 0.5, "period": 8,
}  # fmt: skip
"""The larger lr, the more a rounding of a gradient grows: at .02 and rank 4, one of 1 ulp in one
process moves a weight by up to 3e-6 in 20 steps, where a singular value is near the next."""
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "subspace": {"perp_scale": 0.0, "rank": 12, "basis": "svd"},
    "criterion": {"refresh_below": 0.02, "limiter": 1.0},
    "full": {"rank": 1.0},
    "small buckets": {"bucket_mb": 0.004},
    "gram": {"strategy": "gram"},
    "gram, subspace, svd": {"strategy": "gram", "perp_scale": 0.0, "basis": "svd"},
    "gram, full": {"strategy": "gram", "rank": 1.0},
    "gram, criterion": {"strategy": "gram", "refresh_below": 0.02, "limiter": 1.0},
}
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


def train(
    layout: str, options: dict[str, Any], odd: bool = True, zeros: bool = False
) -> dict[str, Any]:
    """``zeros``: in place of a missing gradient, as DeepSpeed has them."""
    placed = layouts.build(layout, odd=odd)
    with quiet():
        groups = spectral_dist.param_groups(placed.model, split={"qkv": 3})
        optimizer = spectral_dist.SUMO(groups, **{**OPTIONS, **options})
        refreshed: dict[str, int] = {}
        before: dict[str, Tensor] = {}
        for step in range(STEPS):
            placed.backward(step)
            for p in placed.named.values() if zeros else ():
                p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad else p.grad
            optimizer.step()
            for part in optimizer.matrix_parts():
                if part.name == "basis":
                    basis, old = part.values, before.get(part.matrix)
                    refreshed[part.matrix] = refreshed.get(part.matrix, 0) + (
                        old is None or not torch.equal(basis, old)
                    )
                    before[part.matrix] = basis.clone()
    parts = [
        (p.matrix, p.name, p.shape, p.values.numel(), p.is_primary)
        for p in optimizer.matrix_parts()
    ]
    kept = {key for state in optimizer.state.values() for key in state if "exp_avg_sq" not in state}
    return {
        "parameters": placed.full(), "parts": parts, "refreshed": refreshed, "shard state": kept,
        "polar_calls": optimizer.polar_calls,
    }  # fmt: skip


@functools.cache
def alone(setting: str, odd: bool) -> dict[str, Any]:
    options = {k: v for k, v in SETTINGS[setting].items() if k != "strategy"}
    return train("one", options, odd)


@pytest.mark.parametrize(("layout", "world", "setting"), CASES)
@pytest.mark.fast_cases(
    "ddp-3-full",
    "fsdp-4-criterion",
    "fsdp-2-gram",
    "hsdp-4-gram",
    "tp-2-gram, criterion",
    "tp_fsdp-4-paper",
)
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
