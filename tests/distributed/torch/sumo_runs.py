"""Runs of SUMO under the layouts of plain torch, and in one process."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import spectral_dist
from spectral_dist.polar import gram_root
from tests.distributed.torch import layouts
from tests.support.quiet import quiet

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
    # matrix state has its names there, with empty tensors
    kept = {
        key
        for state in optimizer.state.values()
        for key, value in state.items()
        if "exp_avg_sq" not in state and value.numel()
    }
    return {
        "parameters": placed.full(), "parts": parts, "refreshed": refreshed, "shard state": kept,
        "polar_calls": optimizer.polar_calls,
    }  # fmt: skip


def train_by_products(layout: str, options: dict[str, Any], odd: bool = True) -> dict[str, Any]:
    """Step without eigendecompositions, as on a GPU."""
    with mock.patch.object(gram_root, "may_wait", return_value=False):
        return train(layout, options, odd)


@functools.cache
def alone(setting: str, odd: bool) -> dict[str, Any]:
    options = {k: v for k, v in SETTINGS[setting].items() if k != "strategy"}
    return train("one", options, odd)
