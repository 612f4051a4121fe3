"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled as in arXiv 2502.16982)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spectral_dist.rules.base import MatrixOps
from spectral_dist.rules.nesterov import NesterovRule
from spectral_dist.rules.options import NesterovOptions, PolarOptions
from spectral_dist.rules.registry import register


@dataclass(frozen=True)
class MuonOptions(NesterovOptions, PolarOptions):
    """Muon's options."""


@register("muon")
class Muon(NesterovRule[MuonOptions]):
    """Orthogonalize the momentum (Jordan et al. 2024; scaled as in arXiv 2502.16982).

    M <- beta M + (1 - beta) G;  U = polar(M or its Nesterov form);  W <- (1 - lr wd) W - lr s U
    """

    example = "lr=0.02, momentum=0.95"

    def direction(self, options: MuonOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return U of each matrix of (k, m, n)."""
        return ops.polar(matrices)
