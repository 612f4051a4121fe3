"""One side of a matrix and the blocks that rotate it: where they lie, and what they do to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_dist.poet.cayley import packed_size
from spectral_dist.poet.permutation import permutation

Span: TypeAlias = tuple[int, int]
"""A run of indices: the first one, and how many."""


@dataclass(frozen=True)
class Rotation:
    """The rotation by one packed skew parameter: of one side of one matrix or of its tile.

    Attributes:
        key: names matrix and side, for permutations.
        skew: the parameter's name in its layer.
        spans: where the dimension lies in this tensor, in order; a tile of a fused weight has
            several.
        block: the size b of the blocks.
        segments: of the whole dimension.
        seed: of permutations.
        fully: whether R moves a random subset of ``block`` indices; else (block-stochastic) it
            moves all of them, in blocks.
        rank, ranks: which part of the dimension the tile has, and how many parts there are.

    Raises:
        ValueError: blocks or segments do not fit.
    """

    key: str
    skew: str
    spans: tuple[Span, ...]
    block: int
    segments: int = 1
    seed: int = 0
    fully: bool = False
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        """Check that blocks and segments divide the dimension.

        Raises:
            ValueError: they do not; says what divides what.
        """
        size = self.size * self.ranks
        if self.segments % self.ranks:
            raise ValueError(
                f"{self.key}: segments is {self.segments}, which is no multiple of the"
                f" {self.ranks} ranks that this dimension is cut over; write segments="
                f"{self.ranks}, or a multiple of every tensor-parallel size to be used"
            )
        if size % self.segments:
            raise ValueError(
                f"{self.key}: its dimension, {size}, cannot be cut into {self.segments} equal"
                " segments"
            )
        if self.fully:
            if self.segments > 1:
                raise ValueError(
                    f"{self.key}: the fully stochastic form draws from whole dimensions; write"
                    f" segments=1 (it is {self.segments}), or form='block_stochastic'"
                )
            if not 2 <= self.block <= size:
                raise ValueError(
                    f"{self.key}: block is {self.block}; write from 2 to its dimension, {size}, or"
                    " a fraction of it"
                )
        elif self.block < 2 or (size // self.segments) % self.block:
            length = size // self.segments
            divisors = [b for b in range(2, length + 1) if length % b == 0]
            nearest = max(
                (b for b in divisors if b <= self.block), default=min(divisors, default=0)
            )
            advice = f"{nearest} does: blocks={{'a pattern of its name': (b_in, b_out)}}"
            if not divisors:
                advice = "no block does: leave the layer out, scalars=['a pattern of its name']"
            raise ValueError(
                f"{self.key}: block {self.block} does not divide its dimension, {size}"
                + f" in segments of {length}" * (self.segments > 1)
                + f"; {advice}"
            )

    @property
    def size(self) -> int:
        """Return the size of this tile's part of the dimension."""
        return sum(count for _, count in self.spans)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of this tile's packed blocks: (blocks, b (b - 1) / 2)."""
        return 1 if self.fully else self.size // self.block, packed_size(self.block)

    @property
    def numel(self) -> int:
        """Return the number of elements of this tile's skew parameter."""
        return self.shape[0] * self.shape[1]

    def index(self, merges: int) -> Tensor:
        """Return this tile's indices, block after block, after ``merges``; int64 on the CPU."""
        indices = torch.cat([torch.arange(first, first + count) for first, count in self.spans])
        local_segments = self.segments // self.ranks
        length = self.size // local_segments
        permuted = []
        for i in range(local_segments):
            segment = self.rank * local_segments + i
            order = permutation(length, "poet", self.seed, self.key, segment, merges)
            permuted.append(indices[i * length : (i + 1) * length][order])
        return torch.cat(permuted)[: self.shape[0] * self.block]


@dataclass(frozen=True)
class Places:
    """Where the blocks of one side lie.

    Attributes:
        index: the indices of all blocks, block after block, (w,).
        inverse: the place of each index in ``index``, (d,); None if blocks do not cover all of d.
    """

    index: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, index: Tensor, covers_all: bool, device: torch.device) -> Places:
        """Return the places of an index that is on the CPU, on a device; without waiting for it."""
        if not covers_all:
            return cls(index.to(device, non_blocking=True), None)
        both = torch.stack([index, torch.argsort(index)]).to(device, non_blocking=True)
        return cls(both[0], both[1])


def rotate(x: Tensor, places: Places, deltas: Sequence[Tensor]) -> Tensor:
    """Return x R^T, (t, d) -> (t, d): rows times the rotations of blocks I + delta.

    Args:
        x: rows (t, d).
        places: of all deltas' blocks, one after the other.
        deltas: R - I of blocks, (k, b, b) each.
    """
    return put_back(x, places, rotate_blocks(x.index_select(1, places.index), deltas))


def put_back(x: Tensor, places: Places, rotated: Tensor) -> Tensor:
    """Return (t, d) with ``rotated`` where the blocks lie, and x elsewhere.

    Args:
        x: rows (t, d).
        places: of the blocks.
        rotated: (t, w).
    """
    if places.inverse is None:
        return x.clone().index_copy_(1, places.index, rotated)
    return rotated.index_select(1, places.inverse)


def rotate_blocks(permuted: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """Return (t, w) of rows (t, w): each block of columns times (I + delta)^T, block after block.

    In half precision x + x delta^T is rounded once, and I + delta never.
    """
    if torch.compiler.is_compiling():  # which cannot write to such views, and fuses the copies
        parts = [
            torch.baddbmm(rows, rows, change.mT).transpose(0, 1).flatten(1)
            for rows, change in zip(_blocks(permuted, deltas), deltas, strict=True)
        ]
        return torch.cat(parts, 1)
    rotated = permuted.clone()
    for result, rows, change in zip(
        _blocks(rotated, deltas), _blocks(permuted, deltas), deltas, strict=True
    ):
        # in its place: a product of its own, block after block, would have to be copied there
        result.baddbmm_(rows, change.mT)
    return rotated


def block_gradients(permuted: Tensor, gradient: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of each delta in ``rotate_blocks``, from the gradient of its result."""
    pairs = zip(_blocks(gradient, deltas), _blocks(permuted, deltas), strict=True)
    return [torch.bmm(upstream.mT, rows) for upstream, rows in pairs]


def _blocks(x: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """Return views (k, t, b) of x (t, w): the columns of each delta's blocks (k, b, b)."""
    views, first = [], 0
    for change in deltas:
        count, block = change.shape[0], change.shape[-1]
        columns = x if len(deltas) == 1 else x.narrow(1, first, count * block)
        views.append(columns.view(len(x), count, block).transpose(0, 1))
        first += count * block
    return views


class Rotate(torch.autograd.Function):
    """``rotate`` as an autograd function that saves its input and not the permuted copy of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor | None, *deltas: Tensor
    ) -> Tensor:
        """Return ``rotate`` of x."""
        ctx.save_for_backward(x, index, inverse, *deltas)
        return rotate(x, Places(index, inverse), deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the rows and of each delta."""
        x, index, inverse, *deltas = ctx.saved_tensors
        places = Places(index, inverse)
        permuted = gradient.index_select(1, index)
        x_gradient: Tensor | None = None
        if ctx.needs_input_grad[0]:
            rotated_back = rotate_blocks(permuted, [change.mT for change in deltas])
            x_gradient = put_back(gradient, places, rotated_back)
        delta_gradients = block_gradients(x.index_select(1, index), permuted, deltas)
        return x_gradient, None, None, *delta_gradients
