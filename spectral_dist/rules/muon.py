"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled as in arXiv 2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SCALES: dict[str, Callable[[int, int], float]] = {
    # RMS 0.2 for an orthogonal direction: AdamW's lr and decay carry over (2502.16982 eq. 4)
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}
"""Factor of the direction of a whole m x n (out x in) matrix."""


class Muon:
    """M <- beta M + (1 - beta) G;  U = polar(M or its Nesterov form);  W <- (1 - lr wd) W - lr s U.

    All but ``direction`` is elementwise and works on shards. ``options`` is the parameter group:
    momentum (beta), nesterov, weight_decay (wd), scale (s).
    """

    def accumulate(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """M <- beta M + (1 - beta) G, in place."""
        torch._foreach_lerp_(list(momenta), list(grads), 1 - options["momentum"])

    def request(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """What must be orthogonalized: Nesterov's (1 - beta) G + beta M, or M itself."""
        if not options["nesterov"]:
            return list(momenta)
        return list(torch._foreach_lerp(list(grads), list(momenta), options["momentum"]))

    def direction(self, matrices: Tensor, polar: Callable[[Tensor], Tensor]) -> Tensor:
        """U for a batch of whole matrices, (k, m, n)."""
        return polar(matrices)

    def settle(
        self,
        options: dict[str, Any],
        lr: float,
        weights: Sequence[Tensor],
        directions: Sequence[Tensor],
        shapes: Sequence[tuple[int, int]],
    ) -> None:
        """W <- (1 - lr wd) W - lr s U, in place. ``shapes`` are those of the whole matrices.

        Half-precision weights are updated in the directions' dtype and rounded once.
        """
        if not weights:
            return
        scale = SCALES[options["scale"]]
        factors = [-lr * scale(*shape) for shape in shapes]
        wide = [
            w.to(d.dtype) for w, d in zip(weights, directions, strict=True)
        ]  # w itself if equal
        torch._foreach_mul_(wide, 1 - lr * options["weight_decay"])
        torch._foreach_add_(wide, list(torch._foreach_mul(list(directions), factors)))
        half = [i for i, weight in enumerate(weights) if wide[i] is not weight]
        if half:
            torch._foreach_copy_([weights[i] for i in half], [wide[i] for i in half])
