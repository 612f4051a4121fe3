"""Read a DeepSpeed engine's weights and optimizer states, and compare them, for the doctor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding.matrix import Matrix


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """Gather all parameters and return copies in float32, by name, on every rank."""
    import deepspeed

    named: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {n: p.detach().float().clone() for n, p in named.items()}


def parameter_dtype(engine: Any) -> torch.dtype:
    """Return the dtype of the model's parameters."""
    dtype: torch.dtype = next(engine.module.parameters()).dtype
    return dtype


def iterate_matrices(optimizer: Any) -> Iterator[tuple[ParamSpec, Matrix, Any]]:
    """Iterate over the matrices of an optimizer: (parameter, matrix, the rule's options for it)."""
    for group in optimizer.param_groups:
        if group["kind"] == "matrix":
            options = optimizer.rule_options(group)
            for spec in optimizer.routes[group["id"]]:
                for matrix in spec.matrices:
                    yield spec, matrix, options


def state_norms(engine: Any) -> dict[str, float]:
    """Return the norms of momentum and matrix state over all matrices and ranks, by state.

    They are right up to a constant factor: what several ranks hold is counted several times.
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
    squares_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(squares_by_rank, squares)
    names = {"exp_avg"}.union(*squares_by_rank)
    return {
        name: math.sqrt(sum(s.get(name, 0.0) for s in squares_by_rank)) for name in sorted(names)
    }


def state_sums(engine: Any) -> list[list[float]]:
    """Return sums of the optimizer's states, which tell whether any of them has changed."""
    optimizer = engine.basic_optimizer
    states = [*optimizer.state.values(), *optimizer.matrix_state().values()]
    return [[float(v.double().sum()) for v in state.values()] for state in states]


def norm_of_difference(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """Return the norm of a - b over the named parameters."""
    return math.sqrt(sum(float((a[n] - b[n]).double().square().sum()) for n in names))


def relative_difference(
    a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """Return |a - b| over |b - start|."""
    return norm_of_difference(a, b, list(a)) / norm_of_difference(b, start, list(b))
