"""Singular values of matrices, for fitting coefficients to what is orthogonalized."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 512
"""Number of bins of a histogram."""
LOWEST = 1e-5
"""Smallest singular value that a histogram counts, of a matrix of Frobenius norm 1."""
_FIRST = torch.tensor(LOWEST, dtype=torch.float32).log10().item()
_EDGES = torch.logspace(_FIRST, 0.0, BINS + 1, dtype=torch.float32).double()
CENTERS = (_EDGES[:-1] * _EDGES[1:]).sqrt()
"""The singular value that each bin of ``histogram`` stands for, (BINS,) float64."""


def singular_values(x: Tensor) -> Tensor:
    """Return the singular values of x (..., m, n) over its norms: (..., min) float64, ascending.

    A matrix that is zero or not finite gives zeros, the others rows of norm 1. They are computed
    from the Gram matrix: right to 1e-8 of the largest one, where the fit needs 1e-3.
    """
    x64 = x.detach().double()
    largest = x64.abs().amax((-2, -1), keepdim=True)
    is_usable = (largest > 0.0) & largest.isfinite()
    x64 = torch.where(is_usable, x64 / largest, 0.0)
    gram = x64 @ x64.mT if x64.shape[-2] <= x64.shape[-1] else x64.mT @ x64
    values: Tensor = torch.linalg.eigvalsh(gram)
    values = values.clamp_min(0.0).sqrt()
    return torch.where(is_usable[..., 0], values / values.norm(dim=-1, keepdim=True), 0.0)


def histogram(matrices: Tensor) -> Tensor:
    """Count the singular values of (k, m, n), each matrix scaled to Frobenius norm 1.

    Returns:
        (BINS,) float64 on the matrices' device, for bins evenly spaced in the logarithm from LOWEST
        to 1. Smaller singular values are not counted.
    """
    values = singular_values(matrices)
    bins = torch.bucketize(values, _EDGES.to(values.device)).clamp_(1, BINS) - 1
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    # singular values below LOWEST stay small whatever the coefficients, so they are left out
    return counts.scatter_add_(0, bins.flatten(), (values >= LOWEST).double().flatten())
