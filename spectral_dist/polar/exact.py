"""The polar factor to the accuracy of a decomposition: for checks, small sides and PolarGrad."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_dist.polar.scaling import unit_max, wide


def by_svd(x: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T from the SVD of x (k, m, n), computed and returned in ``dtype`` (float32 or float64).

    Singular values up to s_max * max(m, n) * eps of ``dtype`` are dropped: a rank-deficient x gives
    a partial isometry, zero gives zero. Error about eps * kappa. LinAlgError: x is not finite.
    """
    y = unit_max(x, wide(x.dtype, dtype)).to(dtype)
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    # the long side: rounding leaves singular values of up to about max(m, n) eps / 20 (measured)
    keep = s > s[..., :1] * (max(x.shape[-2:]) * torch.finfo(dtype).eps)
    return torch.bmm(u * keep[..., None, :], vh, out=torch.empty_like(y))


def by_eigh(x: Tensor) -> Tensor:
    """(X X^T)^(-1/2) X from eigh of the Gram matrix of the short side of x (k, m, n), in float64.

    Eigenvalues up to lam_max * r * eps are dropped (r the short side): a rank-deficient x gives a
    partial isometry, zero gives zero. The Gram matrix squares the condition number: error about
    eps * kappa^2, so take the SVD beyond kappa 1e5. LinAlgError: x is not finite.
    """
    y = unit_max(x, torch.float64)
    tall = y.shape[-2] > y.shape[-1]
    lam, v = torch.linalg.eigh(torch.bmm(y.mT, y) if tall else torch.bmm(y, y.mT))
    keep = lam > lam[..., -1:] * (lam.shape[-1] * torch.finfo(torch.float64).eps)
    # the inner where keeps rsqrt away from the rounded eigenvalues at or below zero
    scale = torch.where(keep, torch.where(keep, lam, 1.0).rsqrt(), 0.0)
    root = torch.bmm(v * scale[..., None, :], v.mT)
    return torch.bmm(y, root) if tall else torch.bmm(root, y)
