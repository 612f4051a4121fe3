"""Newton-Schulz iterations in their standard form and in their Gram form.

Both take a batch (k, m, n) that ``scaling.unit_frobenius`` made, use it as work space, and work on
the short side of it: a tall matrix is multiplied from the right, never transposed. There are no
host synchronisations. Products accumulate as the device's GEMM does (in float32 for float16 and
bfloat16) and round once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_dist.polar.products import TORCH, Products
from spectral_dist.polar.schedules import Row, restarts


def _update(x: Tensor, a: float, scale: float, q: Tensor, out: Tensor) -> Tensor:
    """Compute a X + scale Q X, or a X + scale X Q for tall X, into ``out``.

    Args:
        x: (k, m, n).
        a: factor of X.
        scale: factor of the product.
        q: (k, r, r), symmetric, r the short side.
        out: (k, m, n), not x.
    """
    if x.shape[-2] > x.shape[-1]:
        return torch.baddbmm(x, x, q, beta=a, alpha=scale, out=out)
    return torch.baddbmm(x, q, x, beta=a, alpha=scale, out=out)


def _odd_part(products: Products, r: Tensor, b: float, c: float, out: Tensor) -> Tensor:
    """Compute b R + c R^2 into ``out``."""
    if c == 0.0:
        return torch.mul(r, b, out=out)
    return products.odd_part(r, b, c, out)


def standard(x: Tensor, rows: Sequence[Row], products: Products = TORCH) -> Tensor:
    """Iterate X <- a X + (b A + c A^2) X with A = X X^T, for each (a, b, c) of ``rows``.

    Memory besides x: one more of its size and two Grams (one if every c is 0).

    Args:
        x: (k, m, n), any floating dtype; overwritten.
        rows: (a, b, c) of every step.
        products: how what is symmetric is computed.

    Returns:
        (k, m, n) in the dtype of x, which may be x itself.
    """
    side = min(x.shape[-2:])
    spare = torch.empty_like(x)
    gram = x.new_empty(x.shape[0], side, side)
    poly = torch.empty_like(gram) if any(c for _, _, c in rows) else gram
    for a, b, c in rows:
        products.gram(x, gram)
        if c == 0.0:
            _update(x, a, b, gram, out=spare)
        else:
            _update(x, a, 1.0, _odd_part(products, gram, b, c, out=poly), out=spare)
        x, spare = spare, x
    return x


def gram_polynomial(r: Tensor, rows: Sequence[Row], products: Products = TORCH) -> Tensor:
    """Return the Q for which Q X is the result of the steps of ``rows`` on X, from R = X X^T alone.

    Memory besides r: three of its size, one of which is the result. Use it for few steps at a time
    (``schedules.restarts``): rounding gives R negative eigenvalues, which the polynomials amplify.
    Gram Newton-Schulz, Dao-AILab 2026.

    Args:
        r: (k, s, s); overwritten.
        rows: (a, b, c) of every step; at least one.
        products: how what is symmetric is computed.

    Returns:
        (k, s, s) in the dtype of r.
    """
    z, spare, q = torch.empty_like(r), torch.empty_like(r), torch.empty_like(r)
    for step, (a, b, c) in enumerate(rows):
        _odd_part(products, r, b, c, out=z)
        if step == 0:
            q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            # never one half mirrored: where R vanishes, rounding leaves Q as far from symmetric as
            # it is large (measured: up to 5 times the error, polar_express in float32)
            torch.baddbmm(q, z, q, beta=a, out=spare)
            q, spare = spare, q
        if step + 1 < len(rows):
            products.update(r, z, a, spare)
            products.update(spare, z, a, r)
    return q


def gram(x: Tensor, rows: Sequence[Row], products: Products = TORCH) -> Tensor:
    """Iterate as ``standard`` does, but on R = X X^T, with restarts before R drifts.

    Memory besides x: one more of its size and two Grams, or four Grams if that is more.

    Args:
        x: (k, m, n) in float16, float32 or float64 (bfloat16 is too coarse for R); overwritten.
        rows: (a, b, c) of every step.
        products: how what is symmetric is computed.

    Returns:
        (k, m, n) in the dtype of x.
    """
    side = min(x.shape[-2:])
    r = x.new_empty(x.shape[0], side, side)
    begin = 0
    is_tall = x.shape[-2] > x.shape[-1]
    for end in (*restarts(rows), len(rows)):
        q = gram_polynomial(products.gram(x, r), rows[begin:end], products)
        # the steps have multiplied the rounding errors of Q from the left: X Q in place of X Q^T is
        # up to 1.4 times as far off, and up to 8 times where R is mirrored
        x = _update(x, 0.0, 1.0, q.mT if is_tall else q, out=torch.empty_like(x))
        del q  # before the next one is made
        begin = end
    return x
