"""Polar factors to the accuracy of a decomposition: for checks, small sides and PolarGrad.

Nothing raises for what the values are: inside a collective only one rank would raise, and the
others would wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_dist.polar.scaling import near_one, norm_dtype, null_cutoff


def polar_by_svd(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return U V^T from the SVD of x (k, m, n), computed and returned in ``dtype``.

    Singular values up to ``null_cutoff`` of x's dtype times the largest are dropped: x without full
    rank gives a partial isometry, zero gives zero. Error about eps * kappa. A matrix that contains
    NaN or infinity, and one whose SVD does not converge, comes out as NaN.

    Args:
        x: (k, m, n), any floating dtype.
        dtype: float32 or float64.
    """
    cutoff = null_cutoff(x.shape, x.dtype, dtype)

    def factor(y: Tensor) -> Tensor:
        """Return U V^T of y (k, m, n) without the null directions."""
        u, s, vh = torch.linalg.svd(y, full_matrices=False)
        kept = s > s[..., :1] * cutoff
        return torch.bmm(u * kept[..., None, :], vh, out=torch.empty_like(y))

    y = near_one(x, norm_dtype(x.dtype, dtype)).to(dtype)
    return _map_finite(y.sum((-2, -1)).isfinite(), factor, y)


def polar_by_eigh(x: Tensor) -> Tensor:
    """Return (X X^T)^(-1/2) X of x (k, m, n), by eigh of its Gram matrix, in float64.

    The Gram matrix is that of the short side. Singular values are dropped as ``polar_by_svd`` does.
    The Gram matrix squares the condition number: error about eps * kappa^2, so use the SVD for
    float64 beyond kappa 1e5. A matrix that contains NaN or infinity, and one whose eigh does not
    converge, comes out as NaN.
    """
    y = near_one(x, torch.float64)
    tall = y.shape[-2] > y.shape[-1]
    gram = torch.bmm(y.mT, y) if tall else torch.bmm(y, y.mT)
    root = inverse_root(gram, null_cutoff(x.shape, x.dtype))
    return torch.bmm(y, root) if tall else torch.bmm(root, y)


def inverse_root(r: Tensor, cutoff: float = 0.0) -> Tensor:
    """Return R^(-1/2) on the range of R, for each R = X X^T of (k, s, s), by eigh; symmetric.

    Singular values of X up to ``cutoff`` times its largest are dropped, and so are those that the
    rounding of R hides. A matrix whose trace is NaN or infinite, and one whose eigh does not
    converge, comes out as NaN.
    """

    def root(r: Tensor) -> Tensor:
        """Return R^(-1/2) of finite r (k, s, s)."""
        lam, v = torch.linalg.eigh(r)
        relative_cutoff = max(cutoff**2, lam.shape[-1] * torch.finfo(r.dtype).eps)
        kept = lam > lam[..., -1:] * relative_cutoff
        # the inner where keeps rsqrt away from the rounded eigenvalues at or below zero
        scale = torch.where(kept, torch.where(kept, lam, 1.0).rsqrt(), 0.0)
        return torch.bmm(v * scale[..., None, :], v.mT)

    return _map_finite(r.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite(), root, r)


def _map_finite(is_finite: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``, of x's shape, and NaN for the matrices that are not finite.

    Args:
        is_finite: (k,) bool, one for each matrix.
        function: what to compute, for matrices without NaN and infinity.
        x: (k, m, n).
    """
    mask = is_finite[:, None, None]
    return torch.where(mask, _map_converging(function, torch.where(mask, x, 0.0)), math.nan)


def _map_converging(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``, and NaN for each matrix whose decomposition does not converge."""
    try:
        return function(x)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(x) == 1:
            return torch.full_like(x, math.nan)
        return torch.cat([_map_converging(function, matrix) for matrix in x[:, None]])
