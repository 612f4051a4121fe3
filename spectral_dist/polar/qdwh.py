"""QDWH: the polar factor by Halley's iteration with dynamic weights.

The weights follow from a lower bound of the singular values alone, so the number of steps is known
before the first one: nothing loops on the data, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from spectral_dist.polar.scaling import near_one, norm_dtype, null_cutoff
from spectral_dist.polar.schedules import Row

QR_ABOVE = 100.0
"""The largest condition number of a matrix that is inverted: beyond it a step is done by QR."""

SHARPENING = 3
"""Number of ``sharpen``'s steps, which cost less than the last step of Halley that they save."""

_REDUCE_ABOVE = 1.5  # long side over short side; below it the QR saves less than it costs


def polar_by_qdwh(x: Tensor, dtype: torch.dtype, lower: float | None = None) -> Tensor:
    """Return U V^T of x (k, m, n), computed and returned in ``dtype``.

    Zero rows, columns and matrices stay zero. A matrix that contains NaN or infinity comes out as
    NaN. Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31 (2010); arXiv 2505.21799.

    Args:
        x: (k, m, n), any floating dtype.
        dtype: float32 or float64.
        lower: bound of the singular values of ``unit_spectral`` from below. Singular values from
            1.2 times the bound on come out as 1 within rounding, with an error of direction of eps
            times their condition number; those up to a twelfth of the bound as 0; those in between
            in [0, 1]. None is twice ``null_cutoff``: what is from 2.3 times that cutoff on comes
            out as 1, what is up to a sixth of it as 0.
    """
    if lower is None:
        lower = min(2.0 * null_cutoff(x.shape, x.dtype, dtype), 1.0)
    rows = weights(lower, torch.finfo(dtype).eps)
    y = near_one(x, norm_dtype(x.dtype, dtype)).to(dtype)
    return on_short_side(y, partial(_halley, rows=rows))


@lru_cache(maxsize=64)
def weights(lower: float, eps: float) -> tuple[Row, ...]:
    """Return the (a, b, c) of every step that singular values in [lower, 1] need before sharpening.

    Args:
        lower: in (0, 1].
        eps: of the dtype that is computed in.
    """
    rows: list[Row] = []
    while not can_sharpen(lower, eps):
        square = lower * lower
        d = (4.0 * (1.0 / square - 1.0) / square) ** (1.0 / 3.0)
        s = math.sqrt(1.0 + d)
        a = s + math.sqrt(2.0 - d + 2.0 * (2.0 - square) / (square * s))
        b = (a - 1.0) ** 2 / 4.0
        c = a + b - 1.0
        rows.append((a, b, c))
        lower = min(1.0, lower * (a + b * square) / (1.0 + c * square))
    return tuple(rows)


def can_sharpen(lower: float, eps: float) -> bool:
    """Return whether ``sharpen`` takes singular values in [lower, 1] to 1 within eps / 2."""
    distance = 1.0 - lower
    for _ in range(SHARPENING):
        distance = 7.5 * distance**2
    return distance <= 0.5 * eps


def unit_spectral(w: Tensor) -> Tensor:
    """Divide each matrix of w (k, s, l) by a bound of its 2-norm, in place, and return it.

    w must have the largest element 1. The bound is the root of ||(W W^T)^4||_F^(1/4), at most
    s^(1/16) times the 2-norm: 1.54 times at 1024. Zero stays zero, NaN gives NaN everywhere.
    """
    gram, spare = (w.new_empty(*w.shape[:-1], w.shape[-2]) for _ in range(2))
    torch.bmm(w, w.mT, out=gram)
    bound = w.new_ones(len(w), 1, 1)
    for roots in (1, 2, 3):
        # rows first, as in unit_frobenius; zero matrices meet the clamp
        size = torch.linalg.vector_norm(torch.linalg.vector_norm(gram, dim=-1), dim=-1)
        size = size.clamp_min_(torch.finfo(w.dtype).tiny)[:, None, None]
        root = size
        for _ in range(roots):  # rounded exactly, as a power is not: its bits depend on the place
            root = root.sqrt()
        bound.mul_(root)
        if roots < 3:
            gram.div_(size)
            gram, spare = torch.bmm(gram, gram, out=spare), gram
    return w.div_(bound)


def on_short_side(x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the polar factors of x (k, m, n), contiguous, by a function that takes wide matrices.

    Long matrices X^T = Q R are reduced first: U(X) = U(R^T) Q^T.

    Args:
        x: (k, m, n); used as work space.
        factor: returns the polar factors of (k, s, l), s <= l, which it may overwrite.
    """
    tall = x.shape[-2] > x.shape[-1]
    w = x.mT if tall else x
    short, long = w.shape[-2:]
    if long < _REDUCE_ABOVE * short:
        u = factor(w)
        return (u.mT if tall else u).contiguous()
    q, r = torch.linalg.qr(w.mT)
    u = factor(r.mT)
    if tall:
        return torch.bmm(q, u.mT, out=x)
    return torch.bmm(u, q.mT, out=x)


def qr_term(w: Tensor, scale: float) -> Tensor:
    """Return scale W^T (I + scale^2 W W^T)^-1, transposed, as Q1 Q2^T, without forming W W^T.

    [scale W^T; I] = [Q1; Q2] R.

    Args:
        w: (k, s, l), s <= l.
        scale: above 0.

    Returns:
        (k, s, l) in the dtype of w.
    """
    short, long = w.shape[-2:]
    stack = w.new_zeros(len(w), long + short, short)
    torch.mul(w.mT, scale, out=stack[:, :long])
    stack[:, long:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    q = torch.linalg.qr(stack).Q
    return torch.bmm(q[:, long:], q[:, :long].mT, out=torch.empty_like(w))


def solve(gram: Tensor, w: Tensor) -> Tensor:
    """Return gram^-1 W by Cholesky; gram (k, s, s) is positive definite, w (k, s, l)."""
    # torch.linalg.cholesky would wait for the device to learn whether it failed; this one fails on
    # NaN only, and then all of w is NaN
    return torch.cholesky_solve(w, torch.linalg.cholesky_ex(gram).L)


def sharpen(w: Tensor) -> Tensor:
    """Take singular values near 1 to 1 and small ones to 0; w (k, s, l) is overwritten.

    Each step applies p(x) = (5 x^3 - 3 x^5) / 2, which takes 1 - e to 1 - 7.5 e^2 and e to 2.5 e^3;
    what is above .816 rises. A polish by 1.5 x - .5 x^3 would leave the remainder of a null
    direction, times 1.5.
    """
    gram, poly = (w.new_empty(*w.shape[:-1], w.shape[-2]) for _ in range(2))
    spare = torch.empty_like(w)
    for _ in range(SHARPENING):
        torch.bmm(w, w.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=2.5, alpha=-1.5, out=poly)
        w, spare = torch.bmm(poly, w, out=spare), w
    return w


def _halley(w: Tensor, rows: Sequence[Row]) -> Tensor:
    """Iterate W <- (a I + b W W^T) (I + c W W^T)^-1 W for each (a, b, c), then ``sharpen``."""
    w = unit_spectral(w)
    for a, b, c in rows:
        rest = a - b / c
        if c > QR_ABOVE:
            step = qr_term(w, math.sqrt(c)).mul_(rest / math.sqrt(c))
        else:
            gram = torch.bmm(w, w.mT, out=w.new_empty(*w.shape[:-1], w.shape[-2])).mul_(c)
            gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
            step = solve(gram, w).mul_(rest)
        w = step.add_(w, alpha=b / c)
    return sharpen(w)
