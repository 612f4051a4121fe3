"""PolarGrad (arXiv 2505.21799): the polar factor times the nuclear norm of what it is taken of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_dist.rules.rule import Handle, Rule


class PolarGrad(Rule):
    """Muon with the size of the gradient kept: the step is 1-homogeneous in G.

    Momentum first:  M <- beta M + (1 - beta) G;  U = polar(M);  nu = <M, U>;
                     W <- (1 - lr wd) W - lr nu U
    Polar first:     U = polar(G);  nu = <G, U>;  M <- beta M + (1 - beta) U;
                     W <- (1 - lr wd) W - lr nu M

    With an inexact polar factor nu = sum of s_i s'_i, s the singular values of the one and s' those
    of the other. Options: momentum (beta), polar_first, nu_power (alpha of nu^alpha; 1 in the
    paper, 0 is Muon), weight_decay (wd).
    """

    def absorbs(self, options: dict[str, Any]) -> bool:
        """Polar first."""
        return bool(options["polar_first"])

    def accumulate(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """Momentum first: M <- beta M + (1 - beta) G, in place."""
        if not options["polar_first"]:
            super().accumulate(options, momenta, grads)

    def request(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """What must be orthogonalized: M, or polar first G."""
        return list(grads) if options["polar_first"] else list(momenta)

    def direction(
        self, options: dict[str, Any], matrices: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor | None]:
        """nu^alpha U of each of (k, m, n); polar first U, and nu^alpha as its number."""
        factors = handle.polar(matrices)
        nuclear = handle.inner(matrices, factors)
        nuclear = nuclear.clamp_min(0.0) ** options["nu_power"]
        if options["polar_first"]:
            return factors, nuclear
        return factors * nuclear[:, None, None], None  # in nuclear's dtype, at least float32

    def absorb(
        self,
        options: dict[str, Any],
        momenta: Sequence[Tensor],
        directions: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> list[Tensor]:
        """Polar first: M <- beta M + (1 - beta) U, in place; nu^alpha M."""
        torch._foreach_lerp_(list(momenta), list(directions), 1 - options["momentum"])
        return list(torch._foreach_mul(list(momenta), list(numbers)))
