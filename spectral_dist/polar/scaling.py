"""Scaling of matrices before a polar factor is computed; the factor does not depend on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

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


def near_one(x: Tensor, dtype: torch.dtype, over: OtherSlabs | None = None) -> Tensor:
    """Return a fresh contiguous copy of x, each matrix over a power of two: nothing is rounded.

    The largest magnitude of each matrix is from 1 to 2 in the result, less if it is subnormal in x,
    so the squares of the result sum to a normal number. Zero stays zero. A matrix that contains NaN
    or infinity has NaN in the result.

    Args:
        x: (k, m, n), not empty, at any scale, subnormal included.
        dtype: of the result, with the range of float32 at least.
        over: the other slabs, if x are slabs of matrices; None: they are whole.
    """
    if x.is_cuda:
        return torch.div(x, _powers_of_two(x, over), out=x.new_empty(x.shape, dtype=dtype))
    # CPUs divide in one dtype: of two they make temporaries, which takes up to eight times as long
    y = x.new_empty(x.shape, dtype=dtype).copy_(x)
    return y.div_(_powers_of_two(y, over))


_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""For a dtype: the integer of its size, and the bits of it that hold the exponent."""


class OtherSlabs(Protocol):
    """The ranks that have the other slabs of the same matrices."""

    def largest(self, values: Tensor) -> Tensor:
        """Replace values by the largest on any rank, and return them."""

    def add(self, values: Tensor) -> Tensor:
        """Replace values by their sum over all ranks, and return them."""


def _powers_of_two(x: Tensor, over: OtherSlabs | None = None) -> Tensor:
    """Return the largest normal power of two within each of x (k, m, n), as a fresh (k, 1, 1)."""
    if over is not None and not x.numel():
        largest = x.new_zeros(len(x), 1, 1)
    elif x.is_cuda:
        largest = torch.linalg.vector_norm(x, math.inf, (-2, -1), keepdim=True)
    else:  # two reductions: one vector_norm is ten times slower on CPUs
        largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    largest = largest.to(norm_dtype(x.dtype))
    largest = largest if over is None else over.largest(largest)
    # a number without its mantissa is the power of two below it, and NaN without it is infinity
    bits, exponents = _EXPONENTS[largest.dtype]
    powers: Tensor = largest.view(bits).bitwise_and_(exponents).view(largest.dtype)
    return powers.clamp_min_(torch.finfo(largest.dtype).tiny)


def unit_frobenius(
    x: Tensor, dtype: torch.dtype, safety: float, multiple: int = 1, over: OtherSlabs | None = None
) -> Tensor:
    """Return a fresh contiguous x / (||x||_F * safety) in ``dtype``, each matrix on its own.

    Norms are in float32 (float64 if x or ``dtype`` is); the result is rounded once. There is no
    eps: it would break U(cA) = U(A) for small A. Zero stays zero.

    Args:
        x: (k, m, n), not empty.
        dtype: of the result.
        safety: singular values of the result are at most 1 / safety.
        multiple: of which both sides of the result are, filled up with zeros.
        over: the other slabs, if x are slabs of matrices, some of which may be empty; None: they
            are whole.
    """
    wide = norm_dtype(x.dtype, dtype)
    # a GPU reads bfloat16 as it is, which is half of what float32 is
    y = near_one(x, x.dtype if x.is_cuda and x.dtype == torch.bfloat16 else wide, over)
    # rows first: one float32 sum over a whole matrix loses up to 1% (2^25 entries, CPU)
    rows = torch.linalg.vector_norm(y, dim=-1, dtype=wide)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    norm = norm if over is None else over.add(norm.square_()).sqrt_()
    norm.mul_(safety)
    norm = norm.clamp_min_(torch.finfo(wide).tiny)[:, None, None]
    k, m, n = x.shape
    if m % multiple or n % multiple:
        padded = y.new_zeros(k, m + -m % multiple, n + -n % multiple, dtype=dtype)
        torch.div(y, norm, out=padded[:, :m, :n])
        return padded
    if y.is_cuda:
        return torch.div(y, norm, out=y if y.dtype == dtype else torch.empty_like(y, dtype=dtype))
    return y.div_(norm).to(dtype)
