"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled as in arXiv 2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_dist.rules.rule import Handle, Rule

SCALES: dict[str, Callable[[int, int], float]] = {
    # RMS 0.2 for an orthogonal direction: AdamW's lr and decay carry over (2502.16982 eq. 4)
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}
"""Factor of the direction of a whole m x n (out x in) matrix."""


class Muon(Rule):
    """M <- beta M + (1 - beta) G;  U = polar(M or its Nesterov form);  W <- (1 - lr wd) W - lr s U.

    Options: momentum (beta), nesterov, weight_decay (wd), scale (s).
    """

    def request(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """What must be orthogonalized: Nesterov's (1 - beta) G + beta M, or M itself."""
        if not options["nesterov"]:
            return list(momenta)
        return list(torch._foreach_lerp(list(grads), list(momenta), options["momentum"]))

    def direction(
        self, options: dict[str, Any], matrices: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor | None]:
        """U of each of (k, m, n)."""
        return handle.polar(matrices), None

    def scale(self, options: dict[str, Any], shape: tuple[int, int]) -> float:
        """s of a whole matrix of this shape."""
        return SCALES[options["scale"]](*shape)
