"""The polar factor to the accuracy of a decomposition: for checks, small sides and PolarGrad.

Nothing raises for what the values are: in a collective that would be on one rank alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_dist.polar.scaling import null_cutoff, unit_max, wide


def by_svd(x: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T from the SVD of x (k, m, n), computed and returned in ``dtype`` (float32 or float64).

    Singular values up to ``null_cutoff`` of x's dtype times the largest are dropped: x without full
    rank gives a partial isometry, zero gives zero. Error about eps * kappa. A matrix with NaN or
    infinity in it, and one of which the SVD does not converge, comes out as NaN.
    """
    cutoff = null_cutoff(x.shape, x.dtype, dtype)

    def factor(y: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(y, full_matrices=False)
        keep = s > s[..., :1] * cutoff
        return torch.bmm(u * keep[..., None, :], vh, out=torch.empty_like(y))

    y = unit_max(x, wide(x.dtype, dtype)).to(dtype)
    return _where(y.sum((-2, -1)).isfinite(), factor, y)


def by_eigh(x: Tensor) -> Tensor:
    """(X X^T)^(-1/2) X from eigh of the Gram matrix of the short side of x (k, m, n), in float64.

    Singular values are dropped as ``by_svd`` does. The Gram matrix squares the condition number:
    error about eps * kappa^2, so of float64 take the SVD beyond kappa 1e5. Not finite: as by_svd.
    """
    y = unit_max(x, torch.float64)
    tall = y.shape[-2] > y.shape[-1]
    gram = torch.bmm(y.mT, y) if tall else torch.bmm(y, y.mT)
    root = inverse_root(gram, null_cutoff(x.shape, x.dtype))
    return torch.bmm(y, root) if tall else torch.bmm(root, y)


def inverse_root(r: Tensor, cutoff: float = 0.0) -> Tensor:
    """R^(-1/2) on the range of R, for each R = X X^T of (k, s, s), by eigh; symmetric.

    Singular values of X up to ``cutoff`` times its largest are dropped, and those that R's rounding
    hides. A matrix whose trace is NaN or infinite, and one of which eigh does not converge, comes
    out as NaN.
    """

    def root(r: Tensor) -> Tensor:
        lam, v = torch.linalg.eigh(r)
        least = max(cutoff**2, lam.shape[-1] * torch.finfo(r.dtype).eps)
        keep = lam > lam[..., -1:] * least
        # the inner where keeps rsqrt away from the rounded eigenvalues at or below zero
        scale = torch.where(keep, torch.where(keep, lam, 1.0).rsqrt(), 0.0)
        return torch.bmm(v * scale[..., None, :], v.mT)

    return _where(r.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite(), root, r)


def _where(fine: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of the same shape, where ``fine`` (k,), of each of x (k, m, n); else NaN."""
    fine = fine[:, None, None]
    return torch.where(fine, _each(function, torch.where(fine, x, 0.0)), math.nan)


def _each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with NaN for each matrix of which a decomposition does not converge."""
    try:
        return function(x)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(x) == 1:
            return torch.full_like(x, math.nan)
        return torch.cat([_each(function, matrix) for matrix in x[:, None]])
