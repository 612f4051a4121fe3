"""Runs under DistributedDataParallel with gradients reduced to owners, and without."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import spectral_dist
from spectral_dist.integrations.torch.reduce_to_owners import OwnerReduction, reduce_to_owners
from tests.distributed.torch import layouts
from tests.support.quiet import quiet

STEPS = 4
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
HEADS = {"qkv": [8, 8, 8]}
"""A pattern that repeats three times: matrices in several blocks of rows, of several owners."""
CLIP = 0.05
"""Below the norm of every step's gradient."""


def model_of(dtype: torch.dtype = torch.float32, **ddp: Any) -> DistributedDataParallel:
    model = layouts.conditioned(odd=True).to(dtype)
    ddp.setdefault("find_unused_parameters", not ddp.get("static_graph"))
    return DistributedDataParallel(model, bucket_cap_mb=0.01, **ddp)


def optimizer_of(
    model: nn.Module, title: str = "Muon", split: Any = 3, **options: Any
) -> spectral_dist.Muon:
    split = split if isinstance(split, dict) else {"qkv": split}
    groups = spectral_dist.param_groups(model, split=split)
    rules = {"SUMO": {"rank": 0.5, "period": 3}}
    settings = {**OPTIONS, **rules.get(title, {}), **options}
    return getattr(spectral_dist, title)(groups, **settings)


def backward(model: nn.Module, step: int, accumulation: int = 1) -> None:
    """Add this rank's gradients, reduced in the last micro-batch."""
    chunks = list(layouts.tokens(step).chunk(dist.get_world_size() * accumulation))
    batches = chunks[dist.get_rank() :: dist.get_world_size()]
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        with contextlib.nullcontext() if last else model.no_sync():
            (model(batch) / accumulation).backward()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def run(
    owners: bool,
    first: int = 0,
    last: int = STEPS,
    clip: float = 0.0,
    accumulation: int = 1,
    zeros: bool = False,
    load: str = "",
    save: str = "",
    ddp: dict[str, Any] | None = None,
    monitor: str = "",
    **options: Any,
) -> dict[str, Any]:
    """``zeros``: gradients are set to zero, not to None."""
    norms = []
    with quiet():
        model = model_of(**(ddp or {}))
        optimizer = optimizer_of(model, **options)
        if monitor:
            write = [spectral_dist.monitor.to_jsonl(monitor)]
            optimizer.monitor = spectral_dist.monitor.Monitor(2, write)
        reduction = reduce_to_owners(model, optimizer) if owners else None
        if load:
            spectral_dist.checkpoint.load(load, model, optimizer)
        for step in range(first, last):
            optimizer.zero_grad(set_to_none=not zeros)
            backward(model, step, accumulation)
            if clip and reduction:
                norms.append(float(reduction.clip_grad_norm_(clip)))
            elif clip:
                norms.append(float(clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
        if save:
            spectral_dist.checkpoint.save(save, model, optimizer)
    return {"parameters": values(model), "norms": norms}


def difference(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """The largest of any parameter on any rank; ranks must have the same bits."""
    for ours in found[1:]:
        for name, value in ours["parameters"].items():
            assert torch.equal(value, found[0]["parameters"][name]), name
    pairs = [(found[0]["parameters"][n], v) for n, v in wanted[0]["parameters"].items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


def even(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=bias) for _ in range(8)]
    return nn.Sequential(nn.Embedding(4, 8), *layers, nn.Linear(8, 4, bias=False))


def built(**ddp: Any) -> tuple[DistributedDataParallel, Any, OwnerReduction]:
    model = model_of(**ddp)
    with quiet():
        optimizer = optimizer_of(model)
        return model, optimizer, reduce_to_owners(model, optimizer)
