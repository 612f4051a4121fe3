"""Settings of the optimizers and layouts that the tests train under, and their random gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import spectral_dist
from tests.distributed.torch import layouts

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
FULL_PRECISION = [
    (layout, world)
    for layout, (_, worlds) in layouts.LAYOUTS.items()
    for world in worlds
    if layout not in ("one", "fsdp_mixed") and not layout.endswith("_bf16")
]


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
