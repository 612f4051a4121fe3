"""ROOT (arXiv 2511.20626): outliers clamped, and a polynomial for each shape of matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_dist.rules.muon import Muon
from spectral_dist.rules.rule import Handle


class ROOT(Muon):
    """M <- beta M + (1 - beta) G;  X = M or its Nesterov form;  eps = the q-quantile of |X|;
    B = clamp(X, -eps, eps);  U = AdaNewton(B);  W <- (1 - lr wd) W - lr s U.

    The paper accumulates M <- beta M + G, which only scales X: neither B's direction nor U depends
    on it. The quantile is that of the whole matrix. AdaNewton takes polar_steps steps of one
    (a, b, c) for each shape (min, max). Options: Muon's, quantile (q; 1 clamps nothing),
    coefficients (of every shape, "MINxMAX" -> (a, b, c)), polar_steps.
    """

    def direction(
        self, options: dict[str, Any], matrices: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor | None]:
        """U of each of (k, m, n)."""
        kept = matrices
        if options["quantile"] < 1:
            wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            limits = handle.quantile(wide.abs(), options["quantile"])[:, None, None]
            kept = torch.clamp(wide, -limits, limits)
            handle.note("clamped_fraction", lambda: handle.fraction(wide.abs() > limits))
        row = options["coefficients"][shape_key(handle.shape)]
        return handle.polar(kept, [row] * options["polar_steps"]), None


def shape_key(shape: tuple[int, ...] | torch.Size) -> str:
    """How coefficients are named: "MINxMAX", whatever the orientation."""
    return f"{min(shape)}x{max(shape)}"
