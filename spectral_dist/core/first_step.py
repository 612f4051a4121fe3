"""A rule's first step on one whole matrix, with which a step on shards must agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.matrix_ops import StepContext, WholeMatrixOps
from spectral_dist.rules.base import Rule
from spectral_dist.rules.options import ComputedOptions, MatrixOptions
from spectral_dist.sharding.matrix import Matrix


def first_step(
    rule: Rule[Any], options: MatrixOptions, gradient: Tensor, name: str
) -> tuple[Tensor, dict[str, float]]:
    """Take the first step of a rule on a whole matrix, in float64.

    Args:
        rule: whose step is taken.
        options: of its parameter group.
        gradient: (m, n).
        name: of the matrix, from which a rule may make random numbers.

    Returns:
        What is subtracted from the weight, over lr and without weight decay, (m, n); and the
        Frobenius norms of the momentum and of the matrix state, by name.
    """
    if isinstance(options, ComputedOptions):
        options = replace(options, polar_dtype="auto")
    g = gradient.detach().double().cpu()
    shape = (g.shape[0], g.shape[1])
    momenta = [torch.zeros_like(g).flatten()] if rule.has_momentum(options) else []
    if momenta:
        rule.accumulate(options, momenta, [g.flatten()])
    x = rule.update_input(options, momenta, [g.flatten()])[0].view(1, *shape)
    state = {
        key: torch.zeros(1, *spec.shape, dtype=spec.dtype or torch.float64)
        for key, spec in rule.state(options, shape).items()
    }
    ops = WholeMatrixOps(StepContext(rule, options, [name]), [0], shape, state)
    step = rule.direction(options, x, ops)[0].double() * rule.scale(options, shape)
    norms = {"exp_avg": float(momenta[0].norm())} if momenta else {}
    norms |= {key: float(v.norm()) for key, v in state.items() if v.is_floating_point()}
    return step.to(gradient.device), norms


def matrix_of(matrix: Matrix, parameter: Tensor) -> Tensor:
    """Return a matrix out of its whole parameter, in float64, transposed if rules read it so."""
    flat, width = parameter.reshape(-1), matrix.width
    rows = torch.cat([flat[s : s + r * width] for s, r in matrix.blocks]).view(-1, width)
    step = 1 if matrix.columns is None else matrix.columns.step
    runs = matrix.column_runs(0, width)
    stored = torch.cat([rows[:, c : c + k * step : step] for _, c, k in runs], 1).double()
    return stored.mT if matrix.transposed else stored


def describe_method(rule: Rule[Any], options: MatrixOptions, matrix: Matrix) -> str:
    """Return a few words on how a rule computes the polar factor of a matrix."""
    spec = rule.polar(options, matrix.shape)
    if spec is None:
        return "of which the rule takes none"
    method = spec.method if isinstance(spec.method, str) else "a schedule of (a, b, c)"
    inside = "" if spec.rank is None else f" in a subspace of rank {spec.rank}"
    return f"polar={method}{inside}"
