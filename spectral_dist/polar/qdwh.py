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

from spectral_dist.polar.scaling import unit_max, wide
from spectral_dist.polar.schedules import Row

QR_ABOVE = 100.0
"""Condition number that an inverse may have at most: beyond it a step is done by QR."""

_REDUCE = 1.5  # long side over short side; below it the reduction saves less than it costs


def by_qdwh(x: Tensor, dtype: torch.dtype, lower: float | None = None) -> Tensor:
    """U V^T of x (k, m, n), computed and returned in ``dtype`` (float32 or float64).

    lower: bound of the singular values of ``unit_spectral(x)`` from below; None is ``dtype``'s eps.
    Down to it they come out as 1 within rounding, with an error of direction of eps times their
    condition number. Below it they come out in [0, 1]: zero rows, zero columns and zero matrices
    stay zero, but rank that is missing only up to rounding is partly filled, in whatever directions
    rounding left there. A matrix with NaN or infinity in it comes out as NaN.
    Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31 (2010); arXiv 2505.21799.
    """
    eps = torch.finfo(dtype).eps
    rows = weights(eps if lower is None else lower, eps)
    return on_short_side(unit_spectral(x, dtype), partial(_halley, rows=rows))


@lru_cache(maxsize=64)
def weights(lower: float, eps: float) -> tuple[Row, ...]:
    """(a, b, c) of every step that singular values in [lower, 1] need before ``polish``.

    0 < lower <= 1. From eps of float32 4 steps, of float64 5.
    """
    rows: list[Row] = []
    while not polished(lower, eps):
        square = lower * lower
        d = (4.0 * (1.0 / square - 1.0) / square) ** (1.0 / 3.0)
        s = math.sqrt(1.0 + d)
        a = s + math.sqrt(2.0 - d + 2.0 * (2.0 - square) / (square * s))
        b = (a - 1.0) ** 2 / 4.0
        c = a + b - 1.0
        rows.append((a, b, c))
        lower = min(1.0, lower * (a + b * square) / (1.0 + c * square))
    return tuple(rows)


def polished(lower: float, eps: float) -> bool:
    """Whether ``polish`` takes singular values in [lower, 1] to 1 within eps / 2."""
    return 1.5 * (1.0 - lower) ** 2 <= 0.5 * eps


def unit_spectral(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Fresh contiguous copy in ``dtype``, each matrix of x (k, m, n) over a bound of its 2-norm.

    The bound is the smaller of the Frobenius norm and sqrt(1-norm * inf-norm), at most sqrt(r)
    times the 2-norm, r the short side. Any scale; zero stays zero, NaN and infinity give NaN.
    """
    y = unit_max(x, wide(x.dtype, dtype)).to(dtype)
    # rows first, as in unit_frobenius
    frobenius = torch.linalg.vector_norm(torch.linalg.vector_norm(y, dim=-1), dim=-1)
    size = y.abs()
    mixed = (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt_()
    # a largest element of 1 makes every norm at least 1, so only zero matrices meet the clamp
    return y.div_(torch.minimum(frobenius, mixed).clamp_min_(1.0)[:, None, None])


def on_short_side(x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Polar factors of x (k, m, n) by ``factor``, which takes wide matrices and may overwrite them.

    x is used as work space. Long matrices X^T = Q R are reduced first: U(X) = U(R^T) Q^T. The
    result is contiguous.
    """
    tall = x.shape[-2] > x.shape[-1]
    w = x.mT if tall else x
    short, long = w.shape[-2:]
    if long < _REDUCE * short:
        u = factor(w)
        return (u.mT if tall else u).contiguous()
    q, r = torch.linalg.qr(w.mT)
    u = factor(r.mT)
    if tall:
        return torch.bmm(q, u.mT, out=x)
    return torch.bmm(u, q.mT, out=x)


def qr_term(w: Tensor, scale: float) -> Tensor:
    """scale W^T (I + scale^2 W W^T)^-1 as Q1 Q2^T, without forming W W^T; w (k, s, l), s <= l.

    The result is (k, s, l), transposed. [scale W^T; I] = [Q1; Q2] R.
    """
    short, long = w.shape[-2:]
    stack = w.new_zeros(len(w), long + short, short)
    torch.mul(w.mT, scale, out=stack[:, :long])
    stack[:, long:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    q = torch.linalg.qr(stack).Q
    return torch.bmm(q[:, long:], q[:, :long].mT, out=torch.empty_like(w))


def solve(gram: Tensor, w: Tensor) -> Tensor:
    """gram^-1 W by Cholesky; gram (k, s, s) positive definite, w (k, s, l)."""
    # _ex: the other one waits for the device to ask whether it failed; here it fails only on NaN,
    # which w has everywhere then
    return torch.cholesky_solve(w, torch.linalg.cholesky_ex(gram).L)


def polish(w: Tensor) -> Tensor:
    """1.5 W - 0.5 W W^T W: takes W, orthogonal within e, to orthogonal within e^2; w (k, s, l)."""
    gram = torch.bmm(w, w.mT, out=w.new_empty(*w.shape[:-1], w.shape[-2]))
    return torch.baddbmm(w, gram, w, beta=1.5, alpha=-0.5, out=torch.empty_like(w))


def _halley(w: Tensor, rows: Sequence[Row]) -> Tensor:
    """W <- (a I + b W W^T) (I + c W W^T)^-1 W for each (a, b, c), then the polish."""
    for a, b, c in rows:
        rest = a - b / c
        if c > QR_ABOVE:
            step = qr_term(w, math.sqrt(c)).mul_(rest / math.sqrt(c))
        else:
            gram = torch.bmm(w, w.mT, out=w.new_empty(*w.shape[:-1], w.shape[-2])).mul_(c)
            gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
            step = solve(gram, w).mul_(rest)
        w = step.add_(w, alpha=b / c)
    return polish(w)
