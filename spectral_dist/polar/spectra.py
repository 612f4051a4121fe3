"""Singular values of matrices, for fitting coefficients to what is orthogonalized."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 512
LOWEST = 1e-5
_FIRST = torch.tensor(LOWEST, dtype=torch.float32).log10().item()
_EDGES = torch.logspace(_FIRST, 0.0, BINS + 1, dtype=torch.float32).double()
CENTERS = (_EDGES[:-1] * _EDGES[1:]).sqrt()
"""Singular values that ``histogram``'s numbers are of, (BINS,) float64."""


def singular_values(x: Tensor) -> Tensor:
    """Return the singular values of (..., m, n) over their norms: (..., min) float64, ascending.

    A matrix that is zero or not finite gives zeros, the others rows of norm 1. By the Gram matrix:
    right to 1e-8 of the largest one, where the fit needs 1e-3.
    """
    wide = x.detach().double()
    largest = wide.abs().amax((-2, -1), keepdim=True)
    sound = (largest > 0.0) & largest.isfinite()
    wide = torch.where(sound, wide / largest, 0.0)
    gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
    values: Tensor = torch.linalg.eigvalsh(gram)
    values = values.clamp_min(0.0).sqrt()
    return torch.where(sound[..., 0], values / values.norm(dim=-1, keepdim=True), 0.0)


def histogram(matrices: Tensor) -> Tensor:
    """Count the singular values of (k, m, n), each matrix scaled to Frobenius norm 1.

    Returns:
        (BINS,) float64 on the matrices' device, evenly spaced in the logarithm from LOWEST to 1.
    """
    values = singular_values(matrices)
    bins = torch.bucketize(values, _EDGES.to(values.device)).clamp_(1, BINS) - 1
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    # what is below stays small whatever the coefficients
    return counts.scatter_add_(0, bins.flatten(), (values >= LOWEST).double().flatten())
