"""What `spectral-dist doctor` reads off a DeepSpeed engine: weights, states, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding.layout import Matrix


def whole(engine: Any) -> dict[str, Tensor]:
    """All parameters in float32, on every rank."""
    import deepspeed

    named: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {n: p.detach().float().clone() for n, p in named.items()}


def whole_dtype(engine: Any) -> torch.dtype:
    """The dtype of the model's parameters."""
    dtype: torch.dtype = next(engine.module.parameters()).dtype
    return dtype


def matrices_of(optimizer: Any) -> Iterator[tuple[ParamSpec, Matrix, Any]]:
    """Iterate over the matrices of an optimizer: (route, matrix, the rule's options of it)."""
    for group in optimizer.param_groups:
        if group["kind"] == "matrix":
            options = optimizer.rule_options(group)
            for route in optimizer.routes[group["id"]]:
                for matrix in route.matrices:
                    yield route, matrix, options


def kept_norms(engine: Any) -> dict[str, float]:
    """Return norms, over all matrices and ranks, of momentum and matrix state, by name.

    Up to a constant factor: what several ranks have counts for each.
    """
    optimizer = engine.basic_optimizer
    squares: dict[str, float] = {}
    tensors = [
        ("exp_avg", state["exp_avg"])
        for state in optimizer.state.values()
        if state.keys() == {"step", "exp_avg"}
    ]
    tensors += [(part.name, part.values) for part in optimizer.matrix_parts()]
    for name, values in tensors:
        squares[name] = squares.get(name, 0.0) + float(values.double().square().sum())
    names = sorted({"exp_avg", *(name for name, _ in tensors)})
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, squares)
    return {
        name: math.sqrt(sum(found.get(name, 0.0) for found in every))
        for name in sorted({*names, *(name for found in every for name in found)})
    }


def snapshot(engine: Any) -> list[list[float]]:
    """Sums that tell whether any state of the optimizer has changed."""
    optimizer = engine.basic_optimizer
    states = [*optimizer.state.values(), *optimizer.matrix_state().values()]
    return [[float(v.double().sum()) for v in state.values()] for state in states]


def length(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """Norm of a - b over the named parameters."""
    return math.sqrt(sum(float((a[n] - b[n]).double().square().sum()) for n in names))


def relative(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """|a - b| over |b - start|."""
    return length(a, b, list(a)) / length(b, start, list(b))
