"""The Cayley-Neumann map: packed skew-symmetric blocks -> G - I, with G (nearly) orthogonal.

G = (I + Q)(I + Q + ... + Q^k) = I + 2 Q + ... + 2 Q^k + Q^(k+1), arXiv 2603.05500 (k = 3 there), or
exactly Cayley's (I + Q)(I - Q)^-1. With eigenvalues +-i theta of Q, the singular values of G are
1 + theta^2 (k = 1), sqrt(1 + theta^6) (2), 1 - theta^4 (3), sqrt(1 + theta^10) (4).

Everything here works on G - I: near the identity, G would round to 16-bit's grid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
    places, signs = _square(block, skew.device)
    q: Tensor = skew.index_select(1, places).mul_(signs)
    return q.view(-1, block, block)


@functools.lru_cache(maxsize=64)
def _square(block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each element of a flat Q the packed number that it is, and its sign, or 0."""
    index = torch.arange(block, device=device)
    rows, columns = index.unsqueeze(1), index
    first, last = torch.minimum(rows, columns), torch.maximum(rows, columns)
    places = first * (2 * block - 1 - first) // 2 + last - first - 1
    # the diagonal is no packed number: any one, times 0
    signs = (columns - rows).sign().float()
    return places.fill_diagonal_(0).flatten().int(), signs.flatten()


@functools.lru_cache(maxsize=64)
def _upper(block: int, device: torch.device) -> Tensor:
    """Return the indices of the strict upper triangle in a flat (block, block), row by row."""
    rows, columns = torch.triu_indices(block, block, 1, device=device)
    indices: Tensor = rows * block + columns
    return indices.int()


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
    # with D_k for G - I of order k: D_1 = 2 Q + S, D_(k+1) = 2 Q + Q D_k, D_3 = 2 Q + 2 S + S D_1
    squared = torch.bmm(q, q)
    first = torch.add(squared, q, alpha=2)
    if order == 1:
        return first
    if order == 2:
        return torch.baddbmm(q, q, first, beta=2)
    third = torch.baddbmm(first + squared, squared, first)
    return third if order == 3 else torch.baddbmm(q, q, third, beta=2)


def delta_backward(skew: Tensor, block: int, order: Order, gradient: Tensor) -> Tensor:
    """Return X, (k, b, b), whose X - X^T is the gradient of Q's upper triangle, from delta's.

    G - I is c_2 S + c_4 S^2, which is symmetric, plus Q (2 + c_3 S + c_5 S^2), which is skew, with
    S = Q^2. The former only meets A = D + D^T, the latter B = D - D^T; and M Q + Q M of a symmetric
    M is M Q - (M Q)^T. So few products are left, 5 at order 4: with Y = Q B and H = Y + Y^T,

    X = 2 D + C Q,  C = c_3 (Y^T + H) / 2 - c_2 A + S J + (J + c_5 Y^T / 2) S,
    J = c_5 H / 2 - c_4 A.

    Args:
        skew: packed blocks (k, b (b - 1) / 2).
        block: b.
        order: k of the series, or 'exact'.
        gradient: D, (k, b, b).
    """
    if order == EXACT:
        inverse = delta(skew, block, order).div_(2)
        inverse.diagonal(dim1=-2, dim2=-1).add_(1)  # (I - Q)^-1
        return 2 * inverse.mT @ gradient @ inverse.mT
    q = unpack(skew, block)
    even, odd = gradient + gradient.mT, gradient - gradient.mT
    if order == 1:
        return torch.baddbmm(gradient, even, q, beta=2, alpha=-1)
    turned = torch.bmm(q, odd)
    both = turned + turned.mT
    if order == 2:
        total = torch.add(both, turned.mT).div_(2).sub_(even, alpha=2)
        return torch.baddbmm(gradient, total, q, beta=2)
    squared = torch.bmm(q, q)
    if order == 3:
        left = right = torch.neg(even).mul_(2)
        total = torch.add(both, turned.mT).sub_(even, alpha=2)
    else:
        left = torch.add(both, even, alpha=-4)  # 2 J
        right = left + turned.mT
        total = torch.add(right, even, alpha=2)
    total = total.baddbmm_(squared, left, alpha=0.5).baddbmm_(right, squared, alpha=0.5)
    return torch.baddbmm(gradient, total, q, beta=2)


def deltas(
    skews: Sequence[Tensor], blocks: Sequence[int], order: Order, dtype: torch.dtype
) -> list[Tensor]:
    """Return G - I of the blocks of each skew parameter, (k, b, b), in ``dtype``.

    They are computed in at least float32 whatever autocast says, and rounded once; those of one
    size in one batch.

    Args:
        skews: packed blocks of any shape, k b (b - 1) / 2 numbers.
        blocks: b of each.
        order: k of the series, or 'exact'.
        dtype: of the results.
    """
    with no_autocast(skews[0].device):
        parts = {}
        for block, rows in by_size(skews, blocks).items():
            change = delta(rows, block, order).to(dtype)
            parts[block] = iter(torch.split(change, _counts(skews, blocks, block)))
    return [next(parts[block]) for block in blocks]


def delta_gradients(
    skews: Sequence[Tensor], blocks: Sequence[int], order: Order, gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradient of each skew parameter, shaped as it is, from those of ``deltas``."""
    parts = {}
    with no_autocast(skews[0].device):
        for block, rows in by_size(skews, blocks).items():
            members = [g for g, size in zip(gradients, blocks, strict=True) if size == block]
            gradient = (torch.cat(members) if len(members) > 1 else members[0]).to(rows.dtype)
            x = delta_backward(rows, block, order, gradient)
            flat = (x - x.mT).flatten(1)
            parts[block] = iter(torch.split(flat, _counts(skews, blocks, block)))
    packed = []
    for skew, block in zip(skews, blocks, strict=True):
        rows = next(parts[block]).index_select(1, _upper(block, skew.device))
        packed.append(rows.view(skew.shape).to(skew.dtype))
    return packed


def by_size(skews: Sequence[Tensor], blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the packed blocks of each size, (k, b (b - 1) / 2), in at least float32.

    Args:
        skews: packed blocks of any shape.
        blocks: b of each.
    """
    rows: dict[int, list[Tensor]] = {}
    for skew, block in zip(skews, blocks, strict=True):
        wide = skew if skew.dtype == torch.float64 else skew.float()
        rows.setdefault(block, []).append(wide.reshape(-1, packed_size(block)))
    return {b: torch.cat(parts) if len(parts) > 1 else parts[0] for b, parts in rows.items()}


def _counts(skews: Sequence[Tensor], blocks: Sequence[int], block: int) -> list[int]:
    """Return how many blocks each skew parameter of one size has."""
    return [
        skew.numel() // packed_size(block)
        for skew, size in zip(skews, blocks, strict=True)
        if size == block
    ]


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off on the device, if it has one."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


class CayleyNeumann(torch.autograd.Function):
    """``deltas`` as an autograd function that saves its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, blocks: tuple[int, ...], order: Order, dtype: torch.dtype, *skews: Tensor
    ) -> tuple[Tensor, ...]:
        """Return ``deltas`` of the skew parameters."""
        ctx.save_for_backward(*skews)
        ctx.blocks, ctx.order = blocks, order
        return tuple(deltas(skews, blocks, order, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the skew parameters, in their dtypes."""
        packed = delta_gradients(ctx.saved_tensors, ctx.blocks, ctx.order, gradients)
        return None, None, None, *packed


def norms(skew: Tensor, block: int) -> Tensor:
    """Return ||Q||_2 of each block, (k,), by the power iteration.

    The result is some 3% too low or less, never too high.

    Args:
        skew: packed blocks (k, b (b - 1) / 2).
        block: b.
    """
    q = unpack(by_size([skew], [block])[block], block)
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
