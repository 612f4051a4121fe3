"""Inverse square roots of Gram matrices: by eigh on CPUs, elsewhere by products that do not wait.

torch.linalg.eigh waits for the device to learn whether it has converged, and a GPU computes it
slowly. The products are a Newton-Schulz schedule in float64 that converges for every singular value
from the cutoff on: its length depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spectral_dist.polar import exact
from spectral_dist.polar.generate import optimal
from spectral_dist.polar.newton_schulz import gram_polynomial
from spectral_dist.polar.scaling import near_one, null_cutoff
from spectral_dist.polar.schedules import Row
from spectral_dist.polar.stability import evaluate

LEAST_CUTOFF = 1e-5
"""The smallest cutoff of the products: that of float32 matrices with a side of 84. Below it noise
of float32 could rise to where SHARPEN raises it further; and eigenvalues of some eps, which the
rounding of R leaves where there are none, rise by up to 100 / cutoff^2, here to 1e-4."""

SAFETY = 1.001
"""Singular values start below 1 / SAFETY, so that none leaves the schedule's range by rounding."""

SHARPEN: Row = (0.0, 2.5, -1.5)
"""Takes a small e to 2.5 e^3 and 1 - e to 1 - 7.5 e^2; what is above .816 rises."""

_REACHED = 3e-5
"""The distance from 1 at which one step of SHARPEN is left to do: it makes 1e-8 of it."""

_NOISE, _NOISE_LEFT = 2.0**-21, 1e-5
"""What rounding to float32 leaves in null directions, as a part of the largest singular value, and
what may come out of it."""


def may_wait(x: Tensor) -> bool:
    """Return whether a tensor's device is one where decompositions are taken: a CPU."""
    return x.device.type == "cpu"


def inverse_root(
    r: Tensor, cutoff: float = 0.0, *, right: bool = False, by_products: bool | None = None
) -> Tensor:
    """Return Q = R^(-1/2) on the range of R, for the product Q X, for each R = X X^T of (k, s, s).

    By eigh: what ``exact.inverse_root`` returns. By products, with singular values as parts of the
    largest and c the cutoff or, if that is more, ``LEAST_CUTOFF``:

    - from c on they come out as 1, within 1e-8 and, as by eigh, some eps kappa^2;
    - up to 2^-21, which are the null directions of a float32 matrix, as at most 1e-5, but if the
      cutoff is 0;
    - those in between in [0, 1], where eigh drops them.

    Zero gives zero. A matrix whose trace is NaN or infinite comes out as NaN, and changes no other.
    Nothing waits for the device.

    By products Q is not symmetric where R has null directions: it is as large there as 1 / c, and
    the roundings of R make Q X right, but X^T Q wrong by some eps / c^2 (measured at c = 2e-4, rank
    256 of 512: 2e-9 and 7e-7), and so would be the mean of Q and Q^T.

    Args:
        r: (k, s, s), float64 for the accuracy above.
        cutoff: as a part of the largest singular value of X.
        right: whether to return Q^T, for the product X^T Q^T.
        by_products: whether to take the products; None: unless ``may_wait``.
    """
    if by_products is None:
        by_products = not may_wait(r)
    if not by_products:
        return exact.inverse_root(r, cutoff)
    q = _by_products(r, cutoff)
    return q.mT if right else q


def polar_by_products(x: Tensor) -> Tensor:
    """Return U V^T of x (k, m, n) without a decomposition, computed in float64, as float32.

    Errors are those of ``inverse_root`` by products, with the cutoff ``null_cutoff``. Zero stays
    zero; a matrix that contains NaN or infinity comes out as NaN.

    Args:
        x: (k, m, n) in float32 or half precision, which float64's squares hold at any scale.
    """
    y = near_one(x, torch.float64)
    tall = y.shape[-2] > y.shape[-1]
    gram = torch.bmm(y.mT, y) if tall else torch.bmm(y, y.mT)
    root = inverse_root(gram, null_cutoff(x.shape, x.dtype), right=tall, by_products=True)
    return (torch.bmm(y, root) if tall else torch.bmm(root, y)).float()


def polish(r: Tensor) -> Tensor:
    """Return (3 I - R) / 2 for each R = X X^T: takes singular values 1 - e of X to 1 - 1.5 e^2."""
    root = r * -0.5
    root.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return root


@lru_cache(maxsize=256)
def rows_from(cutoff: float, side: int) -> tuple[Row, ...]:
    """Return the steps for singular values from ``cutoff`` times the largest to 1.

    Args:
        cutoff: in [0, 1]; 0 is ``LEAST_CUTOFF``, and nothing takes small ones to 0.
        side: the number of singular values, of which ``_by_products`` bounds the largest: its bound
            is at most side^(1/8) times too large.
    """
    lower = min(1.0, max(cutoff, LEAST_CUTOFF) / side**0.125)
    rows: tuple[Row, ...] = ()
    lowest = 0.0
    while 1.0 - lowest > (_REACHED if cutoff else 1e-8):
        rows = optimal(lower, len(rows) + 1, cushion=0.0, safety=SAFETY)
        lowest = _after(rows, lower / SAFETY)
    if not cutoff:
        return rows
    rows, noise = (*rows, SHARPEN), _after(rows, _NOISE / SAFETY)
    while (noise := evaluate(SHARPEN, noise)) > _NOISE_LEFT:
        rows = (*rows, SHARPEN)
    return rows


def _after(rows: Sequence[Row], x: float) -> float:
    """Return what the steps make of a singular value x."""
    for row in rows:
        x = evaluate(row, x)
    return x


def _by_products(r: Tensor, cutoff: float) -> Tensor:
    """Return what ``inverse_root`` does, by 4 s^3 multiply-adds for most steps of the schedule."""
    rows = rows_from(cutoff, r.shape[-1])
    # R over its trace can be squared at any scale. ||R^2||_F^(1/2) is a far better bound of the
    # largest eigenvalue: s^(1/4) times that at most, where the trace is up to s times it
    traces = _positive(r.diagonal(dim1=-2, dim2=-1).sum(-1))
    r = r / traces
    squares = torch.linalg.vector_norm(torch.linalg.vector_norm(torch.bmm(r, r), dim=-1), dim=-1)
    bounds = _positive(squares.sqrt())
    q = gram_polynomial(r.div_(bounds).div_(SAFETY**2), rows)
    return q.mul_(traces.rsqrt_()).mul_(bounds.rsqrt_()).div_(SAFETY)


def _positive(sizes: Tensor) -> Tensor:
    """Return sizes (k,) as (k, 1, 1), with 1 in place of 0."""
    return sizes.masked_fill(sizes == 0.0, 1.0)[:, None, None]
