"""The Cayley-Neumann map: packed skew-symmetric blocks -> G - I, with G (nearly) orthogonal.

G = (I + Q)(I + Q + ... + Q^k) = I + 2 Q + ... + 2 Q^k + Q^(k+1), arXiv 2603.05500 (k = 3 there), or
exactly Cayley's (I + Q)(I - Q)^-1. With eigenvalues +-i theta of Q, the singular values of G are
1 + theta^2 (k = 1), sqrt(1 + theta^6) (2), 1 - theta^4 (3), sqrt(1 + theta^10) (4).

Everything here works on G - I: near the identity, G would round to 16-bit's grid.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Order: TypeAlias = int | str
EXACT = "exact"
ORDERS: tuple[Order, ...] = (1, 2, 3, 4, EXACT)
POWER_STEPS = 20


def packed_size(block: int) -> int:
    """Return the count of numbers that determine a skew-symmetric (block, block).

    The numbers are its strict upper triangle.
    """
    return block * (block - 1) // 2


def unpack(skew: Tensor, block: int) -> Tensor:
    """Return the skew-symmetric blocks Q, (k, b, b), of their packed numbers.

    Args:
        skew: (k, b (b - 1) / 2), the strict upper triangles row by row.
        block: b.
    """
    upper = skew.new_zeros(len(skew), block * block)
    upper.index_copy_(1, _upper(block, skew.device), skew)
    square = upper.view(-1, block, block)
    q: Tensor = square - square.transpose(1, 2)
    return q


def pack(gradient: Tensor) -> Tensor:
    """Return the gradient of the packed numbers, dL/dQ[r, c] - dL/dQ[c, r], of dL/dQ (k, b, b)."""
    block = gradient.shape[-1]
    flat = (gradient - gradient.transpose(1, 2)).flatten(1)
    packed: Tensor = flat.index_select(1, _upper(block, gradient.device))
    return packed


@functools.lru_cache(maxsize=64)
def _upper(block: int, device: torch.device) -> Tensor:
    """Return the indices of the strict upper triangle in a flat (block, block), row by row."""
    rows, columns = torch.triu_indices(block, block, 1, device=device)
    indices: Tensor = rows * block + columns
    return indices


def delta(skew: Tensor, block: int, order: Order) -> Tensor:
    """Return G - I, (k, b, b), in the dtype of the packed blocks.

    Args:
        skew: packed blocks (k, b (b - 1) / 2).
        block: b.
        order: k of the series, or 'exact'.
    """
    q = unpack(skew, block)
    if order == EXACT:
        eye = torch.eye(block, dtype=q.dtype, device=q.device)
        # unchecked, because the check waits for the device: I - Q has the eigenvalues 1 -+ i theta,
        # none below 1 in size, so it is never singular; NaN and infinity stay, as in the series
        exact: Tensor = torch.linalg.solve_ex(eye - q, 2 * q, check_errors=False).result
        return exact
    squared = q @ q
    if order == 1:
        return 2 * q + squared
    tail = q
    if order != 2:
        tail = 2 * q + (squared if order == 3 else 2 * squared + q @ squared)
    change: Tensor = 2 * q + 2 * squared + squared @ tail
    return change


def delta_backward(skew: Tensor, block: int, order: Order, gradient: Tensor) -> Tensor:
    """Return the gradient of the packed blocks, shaped as they are, from that of ``delta``.

    With A = Q^T and S_j = sum_i A^i D A^(j-1-i), dL/dQ is sum_j c_j S_j over the powers of Q in G.

    Args:
        skew: packed blocks (k, b (b - 1) / 2).
        block: b.
        order: k of the series, or 'exact'.
        gradient: D, (k, b, b).
    """
    d, a = gradient, unpack(skew, block).transpose(1, 2)
    if order == EXACT:
        inverse = torch.eye(block, dtype=a.dtype, device=a.device) + delta(skew, block, order) / 2
        return pack(2 * inverse.mT @ d @ inverse.mT)
    c1, c2, c3, c4, c5 = [2.0] * int(order) + [1.0] + [0.0] * (4 - int(order))
    s2 = a @ d + d @ a
    total = c1 * d + c2 * s2
    if c3:
        a2 = a @ a
        left, right = c3 * s2, c3 * a2
        if c4:
            s4 = a2 @ s2 + s2 @ a2
            left, right = left + c5 * s4, right + c5 * (a2 @ a2) if c5 else right
            total = total + c4 * s4
        total = total + a @ left + d @ right
    return pack(total)


class CayleyNeumann(torch.autograd.Function):
    """``delta`` in at least float32 whatever autocast says, rounded once; saves its input alone."""

    @staticmethod
    def forward(ctx: Any, skew: Tensor, block: int, order: Order, dtype: torch.dtype) -> Tensor:
        """Return ``delta`` of packed blocks (k, b (b - 1) / 2) as (k, b, b) in ``dtype``."""
        ctx.save_for_backward(skew)
        ctx.block, ctx.order = block, order
        with torch.autocast(skew.device.type, enabled=False):
            return delta(_wide(skew), block, order).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the packed blocks, in their dtype."""
        (skew,) = ctx.saved_tensors
        wide = _wide(skew)
        with torch.autocast(skew.device.type, enabled=False):
            packed = delta_backward(wide, ctx.block, ctx.order, gradient.to(wide.dtype))
        return packed.to(skew.dtype), None, None, None


def _wide(skew: Tensor) -> Tensor:
    """Return the packed blocks in at least float32."""
    return skew.to(torch.promote_types(skew.dtype, torch.float32))


def norms(skew: Tensor, block: int) -> Tensor:
    """Return ||Q||_2 of each block, (k,), by the power iteration.

    The result is some 3% too low or less, never too high.

    Args:
        skew: packed blocks (k, b (b - 1) / 2).
        block: b.
    """
    q = unpack(_wide(skew), block)
    # a start vector without symmetry, so that it has a part along the largest direction
    v = torch.cos(torch.arange(block, dtype=q.dtype, device=q.device) + 1.0)
    v = v.expand(len(q), block).unsqueeze(-1)
    for _ in range(POWER_STEPS):
        v = q @ (q @ v)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-30)
    spectral_norms: Tensor = torch.linalg.vector_norm(q @ v, dim=(-2, -1))
    return spectral_norms


def orthogonality_errors(change: Tensor) -> Tensor:
    """Return ||G G^T - I||_F / sqrt(b) of each G = I + ``change``, (k, b, b) -> (k,)."""
    error = change + change.mT + change @ change.mT
    errors: Tensor = torch.linalg.matrix_norm(error) / change.shape[-1] ** 0.5
    return errors
