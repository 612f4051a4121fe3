"""Polar factors from the Gram matrix of the short side alone: X -> Q X, Q a function of R = X X^T.

For matrices whose long side is cut over ranks: only R is ever in one place.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from spectral_dist.polar import Method, rows_of
from spectral_dist.polar.exact import inverse_root
from spectral_dist.polar.newton_schulz import gram_polynomial
from spectral_dist.polar.schedules import Row

__all__ = ["GROWTH", "STEPS_BY_EIGH", "dtype_of", "inverse_root", "multiplier", "steps_of"]

GROWTH = {torch.float32: 0.5, torch.float64: 1e-2}
"""Most that (a_1 ... a_n)^2 eps of R's dtype may be.

Rounding gives a matrix without full rank eigenvalues of about -eps in R, which n steps multiply by
that. Measured on matrices of rank 4, 20 and 250: at 50 nothing is amiss yet, at 700 (deepseekv4 in
float32) the factor is 1e6 times too large, then NaN. In float64 the bound also keeps what was zero
below .01: 12 steps of jordan, 16 of polar_express.
"""
STEPS_BY_EIGH = 6
"""What an eigendecomposition of R costs, in steps of the polynomial of 4 s^3 multiply-adds."""


def dtype_of(method: Method, steps: int | None, dtype: torch.dtype) -> torch.dtype:
    """In which R must be, where ``polar`` would compute in ``dtype``.

    float64 where ``dtype`` is float32 or float64: in float32 R would cost up to two digits of a
    decaying spectrum (measured). float32 where it is half, unless the schedule is too long for it.

    Raises:
        ValueError: R is not enough for this method, or these steps.
    """
    found = rows_of(method, steps)
    if found is None:
        if method == "eigh" or (method == "qdwh" and dtype == torch.float32):
            return torch.float64
        raise ValueError(
            f"polar is {method!r}{' in float64' * (method == 'qdwh')}, which needs the matrix"
            " itself: its Gram matrix squares the condition number; write polar='qdwh' with"
            " polar_dtype='float32', or a Newton-Schulz method"
        )
    growth = _growth(found[0])
    half = dtype in (torch.float16, torch.bfloat16)
    for wide in (torch.float32, torch.float64)[not half :]:
        if growth * torch.finfo(wide).eps <= GROWTH[wide]:
            return wide
    name = repr(method) if isinstance(method, str) else "a schedule of your own"
    raise ValueError(
        f"polar is {name} of {len(found[0])} steps, which raise the rounding errors of a Gram"
        " matrix to the size of the result; write fewer polar_steps"
    )


@lru_cache(maxsize=256)
def _growth(rows: tuple[Row, ...]) -> float:
    return math.prod(a for a, _, _ in rows) ** 2


def steps_of(method: Method, steps: int | None) -> int:
    """Steps of the polynomial, or what an eigendecomposition costs in them."""
    found = rows_of(method, steps)
    return STEPS_BY_EIGH if found is None else len(found[0])


def multiplier(r: Tensor, method: Method, steps: int | None, cutoff: float = 0.0) -> Tensor:
    """Q with polar(X) = Q X, for each R = X X^T of (k, s, s) in float32 or float64, overwritten.

    X at any scale at which R has neither overflowed nor vanished; zero stays zero. Q is symmetric.
    The inverse square root of R by eigh where ``method`` has no polynomial: singular values of X up
    to ``cutoff`` times its largest are dropped; what ``polar`` drops is ``null_cutoff`` of X.
    A matrix with NaN or infinity in it comes out as NaN.
    """
    found = rows_of(method, steps)
    if found is None:
        return inverse_root(r, cutoff)
    rows, safety = found
    # the Frobenius norm squared
    squares = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = torch.where(squares == 0, 1.0, squares)[:, None, None]
    q = gram_polynomial(r.div_(squares).div_(safety**2), rows)
    # rounding makes Q as far from symmetric as it is large where R vanishes. Its own product with X
    # is right, and so is the mean's; that of one half mirrored is not (measured: 12 steps of
    # jordan, 30 times too large)
    q = (q + q.mT).mul_(0.5)
    return q.mul_(squares.rsqrt()).div_(safety)
