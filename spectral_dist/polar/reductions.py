"""Exact reductions of whole matrices: inner products and quantiles. No host synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> of every pair of matrices, (k, m, n) each -> (k,), in at least float32.

    The result is float64 if either is. Rows are summed first: one float32 sum over a whole matrix
    loses digits.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    rows: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype), dim=-1)
    return rows.sum(-1)


def quantile(x: Tensor, q: float) -> Tensor:
    """Return the q-quantile of each matrix's elements, (k, m, n) -> (k,), 0 <= q <= 1.

    Linear interpolation between the order statistics around q (N - 1), as torch.quantile does, but
    for any N, and with the position in float64.
    """
    flat = x.reshape(len(x), -1)
    position = q * (flat.shape[1] - 1)
    low = math.floor(position)
    if position == low:
        return flat.kthvalue(low + 1, dim=1).values
    # the two order statistics around the position are the innermost of the elements in the nearer
    # tail: this selects the fewest elements, sorts none, and is right with ties
    upper = 2 * low >= flat.shape[1]
    tail_size = flat.shape[1] - low if upper else low + 2
    tail = flat.topk(tail_size, dim=1, largest=upper, sorted=False).values
    neighbours = tail.topk(2, dim=1, largest=not upper).values
    below, above = neighbours.unbind(1) if upper else neighbours.flip(1).unbind(1)
    return torch.lerp(below, above, position - low)
