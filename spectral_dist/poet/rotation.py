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
"""First index, and how many."""


@dataclass(frozen=True)
class Rotation:
    """What one packed skew parameter rotates: one side of one matrix, or a tile's part of it.

    ``key``: names matrix and side, for permutations. ``skew``: the parameter's name in its layer.
    ``spans``: where the dimension lies here, in order; a tile of a fused weight has several.
    ``rank`` of ``ranks``: which part of the dimension that is. ``fully``: R moves a random subset
    of ``block`` indices, and else (block-stochastic) all of them, in blocks.

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
        """ValueError that says what divides what."""
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
            fits = [b for b in range(2, length + 1) if length % b == 0]
            near = max((b for b in fits if b <= self.block), default=min(fits, default=0))
            raise ValueError(
                f"{self.key}: block {self.block} does not divide its dimension, {size}"
                + f" in segments of {length}" * (self.segments > 1)
                + f"; {near} does: blocks={{'a pattern of its name': (b_in, b_out)}}"
            )

    @property
    def size(self) -> int:
        """Of the dimension here."""
        return sum(count for _, count in self.spans)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the packed blocks here: (blocks, b (b - 1) / 2)."""
        return 1 if self.fully else self.size // self.block, packed_size(self.block)

    @property
    def numel(self) -> int:
        """Of the skew parameter here."""
        return self.shape[0] * self.shape[1]

    def index(self, merges: int) -> Tensor:
        """The indices here, block after block, after so many merges; int64 on the CPU."""
        places = torch.cat([torch.arange(first, first + count) for first, count in self.spans])
        held = self.segments // self.ranks
        length = self.size // held
        found = []
        for i in range(held):
            segment = self.rank * held + i
            order = permutation(length, "poet", self.seed, self.key, segment, merges)
            found.append(places[i * length : (i + 1) * length][order])
        return torch.cat(found)[: self.shape[0] * self.block]


def rotate(x: Tensor, index: Tensor, deltas: Sequence[Tensor], whole: bool) -> Tensor:
    """x R^T, (t, d) -> (t, d): rows times the rotations of blocks I + delta, at ``index``.

    ``index``: of all deltas' blocks, one after the other; ``whole`` says that it is all of d.
    """
    return put_back(x, index, turn_blocks(x.index_select(1, index), deltas), whole)


def put_back(x: Tensor, index: Tensor, turned: Tensor, whole: bool) -> Tensor:
    """(t, d) with ``turned`` at ``index``, and x elsewhere."""
    result = torch.empty_like(x) if whole else x.clone()
    return result.index_copy_(1, index, turned)


def turn_blocks(picked: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """(t, w) -> (t, w): each block of columns times (I + delta)^T, block after block.

    In half precision x + x delta^T is rounded once, and I + delta never.
    """
    turned = []
    for part, change in zip(_parts(picked, deltas), deltas, strict=True):
        blocks = _blocks(part, change)
        turned.append(torch.baddbmm(blocks, blocks, change.mT).transpose(0, 1).flatten(1))
    return torch.cat(turned, 1) if len(turned) > 1 else turned[0]


def block_gradients(picked: Tensor, gradient: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """Of each delta in ``turn_blocks``, from the gradient of its result."""
    parts = zip(_parts(picked, deltas), _parts(gradient, deltas), deltas, strict=True)
    return [torch.bmm(_blocks(g, change).mT, _blocks(x, change)) for x, g, change in parts]


def _parts(x: Tensor, deltas: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(x, [change.shape[0] * change.shape[-1] for change in deltas], 1)


def _blocks(x: Tensor, change: Tensor) -> Tensor:
    """(t, k b) -> (k, t, b), a view."""
    return x.view(len(x), change.shape[0], change.shape[-1]).transpose(0, 1)


class Rotate(torch.autograd.Function):
    """``rotate``, saving its input and not the permuted copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, whole: bool, *deltas: Tensor) -> Tensor:
        """See ``rotate``."""
        ctx.save_for_backward(x, index, *deltas)
        ctx.whole = whole
        return rotate(x, index, deltas, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the rows, and of each delta."""
        x, index, *deltas = ctx.saved_tensors
        picked = gradient.index_select(1, index)
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            back = turn_blocks(picked, [change.mT for change in deltas])
            of_x = put_back(gradient, index, back, ctx.whole)
        of_deltas = block_gradients(x.index_select(1, index), picked, deltas)
        return of_x, None, None, *of_deltas
