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

__all__ = [
    "MAX_ROUNDING",
    "STEPS_BY_EIGH",
    "equivalent_steps",
    "gram_dtype",
    "inverse_root",
    "multiplier",
]

MAX_ROUNDING = {torch.float32: 0.5, torch.float64: 1e-2}
"""The largest (a_1 ... a_n)^2 eps that R may have, by R's dtype.

Rounding gives a matrix without full rank eigenvalues of about -eps in R, which n steps multiply by
(a_1 ... a_n)^2. Measured on matrices of rank 4, 20 and 250: at 50 nothing is amiss yet, at 700
(deepseekv4 in float32) the factor is 1e6 times too large, then NaN. In float64 the bound also keeps
what was zero below .01: it admits 12 steps of jordan, 16 of polar_express.
"""
STEPS_BY_EIGH = 6
"""The cost of an eigendecomposition of R, in steps of the polynomial of 4 s^3 multiply-adds."""


def gram_dtype(method: Method, steps: int | None, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which R must be, where ``polar`` would compute in ``dtype``.

    float64 where ``dtype`` is float32 or float64: in float32 R would cost up to two digits of a
    decaying spectrum (measured). float32 where ``dtype`` is half precision, unless the schedule is
    too long for it.

    Args:
        method: as ``polar`` takes it.
        steps: as ``polar`` takes it.
        dtype: what ``resolve_dtype`` returns for the matrices.

    Raises:
        ValueError: R is not enough for this method, or for this number of steps.
    """
    polynomials = rows_of(method, steps)
    if polynomials is None:
        if method == "eigh" or (method == "qdwh" and dtype == torch.float32):
            return torch.float64
        raise ValueError(
            f"polar is {method!r}{' in float64' * (method == 'qdwh')}, which needs the matrix"
            " itself: its Gram matrix squares the condition number; write polar='qdwh' with"
            " polar_dtype='float32', or a Newton-Schulz method"
        )
    growth = _growth(polynomials[0])
    is_half = dtype in (torch.float16, torch.bfloat16)
    for candidate in (torch.float32, torch.float64)[not is_half :]:
        if growth * torch.finfo(candidate).eps <= MAX_ROUNDING[candidate]:
            return candidate
    name = repr(method) if isinstance(method, str) else "a schedule of your own"
    raise ValueError(
        f"polar is {name} of {len(polynomials[0])} steps, which raise the rounding errors of a Gram"
        " matrix to the size of the result; write fewer polar_steps"
    )


@lru_cache(maxsize=256)
def _growth(rows: tuple[Row, ...]) -> float:
    """Return (a_1 ... a_n)^2, by which a schedule multiplies the rounding errors of R."""
    return math.prod(a for a, _, _ in rows) ** 2


def equivalent_steps(method: Method, steps: int | None) -> int:
    """Return the steps of the polynomial, or what an eigendecomposition costs in such steps."""
    polynomials = rows_of(method, steps)
    return STEPS_BY_EIGH if polynomials is None else len(polynomials[0])


def multiplier(r: Tensor, method: Method, steps: int | None, cutoff: float = 0.0) -> Tensor:
    """Return Q with polar(X) = Q X, for each R = X X^T.

    Where ``method`` has no polynomial, Q is the inverse square root of R by eigh. A matrix that
    contains NaN or infinity comes out as NaN.

    Args:
        r: (k, s, s) in float32 or float64, of X at any scale at which R has neither overflowed nor
            vanished; overwritten. Zero stays zero.
        method: as ``polar`` takes it.
        steps: as ``polar`` takes it.
        cutoff: singular values of X up to ``cutoff`` times its largest are dropped, by methods
            without a polynomial; ``null_cutoff`` of X is what ``polar`` drops.

    Returns:
        (k, s, s) in the dtype of r, symmetric.
    """
    polynomials = rows_of(method, steps)
    if polynomials is None:
        return inverse_root(r, cutoff)
    rows, safety = polynomials
    # ||X||_F^2 is the trace of R
    squares = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = squares.masked_fill(squares == 0, 1.0)[:, None, None]
    q = gram_polynomial(r.div_(squares).div_(safety**2), rows)
    # where R vanishes, rounding makes Q as far from symmetric as Q is large. The product of Q as it
    # is with X is right, and so is that of the mean of Q and Q^T; that of one triangle mirrored is
    # not (measured: 12 steps of jordan, 30 times too large)
    q = (q + q.mT).mul_(0.5)
    return q.mul_(squares.rsqrt()).div_(safety)
