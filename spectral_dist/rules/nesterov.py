"""The base of rules that orthogonalize a momentum and scale the result by the matrix's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spectral_dist.rules.base import Rule, Shape
from spectral_dist.rules.options import NesterovOptions
from spectral_dist.rules.scales import SCALES

N = TypeVar("N", bound=NesterovOptions)


class NesterovRule(Rule[N]):
    """Orthogonalize M, or Nesterov's (1 - beta) G + beta M, and multiply by s of the shape."""

    def update_input(
        self, options: N, momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return M, or its Nesterov form."""
        if not options.nesterov:
            return list(momenta)
        return list(torch._foreach_lerp(list(grads), list(momenta), options.momentum))

    def scale(self, options: N, shape: Shape) -> float:
        """Return the factor s of a whole matrix of this shape."""
        return SCALES[options.scale](*shape)
