"""Which matrices of one shape a CPU computes in one call: those whose bits do not change by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.matrix_ops import StepContext, WholeMatrixOps
from spectral_dist.polar.batching import MULTIPLE, batch_has_same_bits
from spectral_dist.rules.base import Rule, Shape
from spectral_dist.rules.options import MatrixOptions

STEPS = 2
"""Steps of the trial: the first from no state, the other from that which the first has left."""


def rounds_alike(
    rule: Rule[Any], options: MatrixOptions, shape: Shape, count: int, dtype: torch.dtype
) -> bool:
    """Return whether a rule's directions of ``count`` matrices are, bit by bit, those of each.

    Args:
        rule: of the matrices.
        options: of the group.
        shape: (m, n) of each matrix, as rules read it.
        count: of matrices.
        dtype: in which directions are computed.
    """
    spec = rule.polar(options, shape)
    if spec is not None and spec.rank is not None and spec.rank % MULTIPLE:
        return count == 1
    specs = rule.state(options, shape)
    names = [str(i) for i in range(count)]

    def compute(matrices: Tensor, places: Sequence[int]) -> list[Tensor]:
        """Return the directions of some steps, and the state after them."""
        state = {
            name: torch.zeros(len(places), *spec.shape, dtype=spec.dtype or torch.float32)
            for name, spec in specs.items()
        }
        context = StepContext(rule, options, names)
        directions = [
            rule.direction(
                options, matrices.clone(), WholeMatrixOps(context, list(places), shape, state)
            )
            for _ in range(STEPS)
        ]
        return [*directions, *state.values()]

    return batch_has_same_bits(compute, (count, *shape), dtype)
