"""Scaling of matrices before a polar factor is computed; the factor does not depend on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms are taken: float64 if any of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def null_cutoff(shape: Sequence[int], *dtypes: torch.dtype) -> float:
    """Return the largest ratio to the largest singular value that rounding gives a null direction.

    The cutoff is max(m, n) eps of float32 or float64. Half precision is what float32 sums were
    rounded to once, and that moves singular values by .58 eps of the largest at most, whatever the
    shape, if the roundings are independent: there the cutoff is eps, if that is more (max(m, n) eps
    would be beyond the largest singular value itself, from 128 columns of bfloat16 on).

    Args:
        shape: (..., m, n) of the matrices.
        dtypes: in which the matrices were given, and in which they are computed; the coarsest
            counts.
    """
    side = max(shape[-2:])
    return max(max(torch.finfo(d).eps, side * torch.finfo(norm_dtype(d)).eps) for d in dtypes)


def unit_max(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a fresh contiguous copy of x in which each matrix's largest magnitude is 1.

    The squares of the result sum to a normal number. Zero stays zero. A matrix that contains NaN or
    infinity has NaN in the result.

    Args:
        x: (k, m, n), not empty, at any scale, subnormal included.
        dtype: of the result, float32 or float64.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
    # two reductions, not vector_norm(inf): that is ten times slower on CPUs
    largest = torch.maximum(y.amax((-2, -1), keepdim=True), -y.amin((-2, -1), keepdim=True))
    return y.div_(largest.clamp_min_(torch.finfo(dtype).tiny))


def unit_frobenius(x: Tensor, dtype: torch.dtype, safety: float, multiple: int = 1) -> Tensor:
    """Return a fresh contiguous x / (||x||_F * safety) in ``dtype``, each matrix on its own.

    Norms and divisions are in float32 (float64 if x or ``dtype`` is); the cast comes last. There is
    no eps: it would break U(cA) = U(A) for small A. Zero stays zero.

    Args:
        x: (k, m, n), not empty.
        dtype: of the result.
        safety: singular values of the result are at most 1 / safety.
        multiple: of which both sides of the result are, filled up with zeros.
    """
    y = unit_max(x, norm_dtype(x.dtype, dtype))
    # rows first: one float32 sum over a whole matrix loses up to 1% (2^25 entries, CPU)
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(y, dim=-1), dim=-1)
    y.div_(norm.mul_(safety).clamp_min_(torch.finfo(y.dtype).tiny)[:, None, None])
    k, m, n = x.shape
    if m % multiple == 0 and n % multiple == 0:
        return y.to(dtype)
    padded = y.new_zeros(k, m + -m % multiple, n + -n % multiple, dtype=dtype)
    padded[:, :m, :n] = y
    return padded
