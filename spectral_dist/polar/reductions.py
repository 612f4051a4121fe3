"""Exact reductions of whole matrices: inner products and quantiles. No host synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every pair of matrices, (k, m, n) each -> (k,), in float32 (float64 if either is).

    Row by row first: one float32 sum over a whole matrix loses digits.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    rows: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype), dim=-1)
    return rows.sum(-1)


def quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of each matrix's elements, (k, m, n) -> (k,), 0 <= q <= 1.

    Linear interpolation between the order statistics around q (N - 1), as torch.quantile does, but
    for any N, and with the position in float64.
    """
    flat = x.reshape(len(x), -1)
    position = q * (flat.shape[1] - 1)
    low = math.floor(position)
    below = flat.kthvalue(low + 1, dim=1).values
    if position == low:
        return below
    # the next order statistic: the same if enough elements are equal to it, else the least above
    above = torch.where(flat > below[:, None], flat, math.inf).amin(1)
    enough = (flat <= below[:, None]).sum(1) > low + 1
    return torch.lerp(below, torch.where(enough, below, above), position - low)
