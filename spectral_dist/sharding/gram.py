"""Whole-matrix quantities of matrices that stay in slabs: only small things travel.

X is (k, m, n) on this rank: the slabs of k matrices, cut along their long side over the group.
Every call is one of all the group's ranks, in the same order; a slab may be empty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.slabs import SlabBatch

DIGIT = 11
"""Bits of a magnitude that one pass of the selection fixes: (k, 2048) counts travel in each."""


class Reduction:
    """Of one batch of slabs.

    Attributes:
        mine: which of the matrices this rank evaluates the polynomial of, and speaks for.
        begin, length: of this rank's slabs, along the matrices' long side.
    """

    def __init__(self, batch: SlabBatch, group: Group, meter: Meter) -> None:
        self.matrices, self.shape = batch.matrices, batch.shape
        self.along = batch.cut.along
        self._group, self._meter = group, meter
        self._rank, self._ranks = collectives.rank(group), collectives.size(group)
        self._owners = batch.owners
        self.mine = [k for k, owner in enumerate(batch.owners) if owner == self._rank]
        begin, end = batch.cut.ranges[self._rank]
        self.begin, self.length = begin, end - begin

    def transposed(self) -> Reduction:
        """Return the same of the matrices' transposes."""
        turned = copy.copy(self)
        turned.shape, turned.along = (self.shape[1], self.shape[0]), 1 - self.along
        return turned

    def add(self, values: Tensor) -> Tensor:
        """Everyone's values added up, in place."""
        collectives.sum_ranks(values, self._group, self._meter)
        return values

    def gram(self, x: Tensor) -> Tensor:
        """X X^T of the short side of this rank's slabs alone, (k, s, s)."""
        return torch.bmm(x, x.mT) if self.along else torch.bmm(x.mT, x)

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """What ``evaluate`` makes of the sums of everyone's parts, (j, ...), on every rank.

        It gets the sums (j', ...) of the matrices that are ``mine``, added in the order of ranks,
        and their places in ``mine``; what it gives, (j', ...), travels unless it is of no elements.
        Of j matrices that divide evenly over P ranks, (P - 1)/P j times the elements of a part, and
        of a result, leave a rank. ``among``: which of the matrices, ascending; None is all.
        """
        which = tuple(range(len(self._owners)) if among is None else among)
        counts, which_mine = _shares(self._owners, self._rank, self._ranks, which)
        places = list(which_mine)
        sums = self._collect(parts.reshape(len(parts), -1), counts)
        found = evaluate(sums.view(len(places), *parts.shape[1:]), places)
        shared = self._return(found.reshape(len(places), math.prod(found.shape[1:])), counts)
        return shared.view(len(parts), *found.shape[1:])

    def multiply(
        self, x: Tensor, dtype: torch.dtype, evaluate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Q X for each matrix, with Q = evaluate(X X^T), as X's dtype.

        ``evaluate`` gets the Grams (k', s, s) in ``dtype`` of the matrices that are ``mine``, and
        may overwrite them; Q is symmetric, and what c X gets is Q / c. Products are in ``dtype``.
        Of each Gram and of its Q only the half travels: for each matrix, s (s + 1) numbers.
        """
        wide = self._bounded(x.to(dtype), x.dtype)
        gram = self.gram(wide)
        side = gram.shape[-1]
        half = self.at_owner(fold(gram), lambda sums, _: fold(evaluate(unfold(sums, side))))
        q = unfold(half, side)
        product = torch.bmm(q, wide) if self.along else torch.bmm(wide, q)
        return product.to(x.dtype)

    def _bounded(self, wide: Tensor, narrow: torch.dtype) -> Tensor:
        """Slabs whose squares neither overflow nor vanish: divided by the matrix's largest entry.

        As they are if their dtype leaves no doubt.
        """
        if torch.finfo(narrow).max < torch.finfo(wide.dtype).max ** 0.25:
            return wide
        largest = wide.new_zeros(len(wide))
        if wide.numel():  # two reductions, not vector_norm(inf): that is ten times slower on CPUs
            largest = torch.maximum(wide.amax((-2, -1)), -wide.amin((-2, -1)))
        collectives.max_ranks(largest, self._group, self._meter)
        return wide / largest.clamp_min(torch.finfo(wide.dtype).tiny)[:, None, None]

    def _collect(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The sums of everyone's rows, of those that are this rank's: counts[r] are rank r's."""
        numel, own = rows.shape[1], counts[self._rank]
        arrived = collectives.all_to_all(
            rows.reshape(-1),
            [count * numel for count in counts],
            [own * numel] * self._ranks,
            self._group,
            self._meter,
        )
        return arrived.wait().view(self._ranks, own, numel).sum(0)

    def _return(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Everyone's rows, in the order of ranks."""
        numel, flat = rows.shape[1], rows.reshape(-1)
        if not numel:
            return rows.new_empty(sum(counts), 0)
        if len(set(counts)) == 1:
            found = collectives.all_gather(flat, self._group, self._meter)
        else:  # a gather would pad
            found = collectives.all_to_all(
                flat.repeat(self._ranks),
                [flat.numel()] * self._ranks,
                [count * numel for count in counts],
                self._group,
                self._meter,
            )
        return found.wait().view(-1, numel)

    def quantile(self, x: Tensor, q: float) -> Tensor:
        """The q-quantile of each whole matrix's elements, (k,), bit by bit as if they were here.

        x: magnitudes, float32 or float64, so that their bits are ordered as they are. Digit by
        digit of the order statistic below; the one above is the next larger number.
        """
        position = q * (math.prod(self.shape) - 1)
        low = math.floor(position)
        bits = x.flatten(1).view(torch.int32 if x.dtype == torch.float32 else torch.int64)
        target = torch.full((len(x),), low, dtype=torch.int64, device=x.device)
        prefix = bits.new_zeros(len(x))
        width = 8 * x.element_size() - 1  # without the sign
        ties = target
        while width:
            digit = min(DIGIT, width)
            counts = self.add(_counts(bits, prefix, width, digit))
            below = counts.cumsum(1)
            found = (below <= target[:, None]).sum(1)
            ties = counts.gather(1, found[:, None])[:, 0]
            target = target - (below.gather(1, found[:, None])[:, 0] - ties)
            prefix = (prefix << digit) + found.to(bits.dtype)
            width -= digit
        value = prefix.view(x.dtype)
        if position == low:
            return value
        above = self._next(bits, prefix)
        above = torch.where(target + 1 < ties, prefix, above).view(x.dtype)
        return torch.lerp(value, above, position - low)

    def _next(self, bits: Tensor, than: Tensor) -> Tensor:
        """The smallest of everyone's ``bits`` that are larger, (k,); the largest if none is."""
        none = torch.iinfo(bits.dtype).max
        least = torch.full_like(than, none)
        if bits.numel():
            least = torch.where(bits > than[:, None], bits, none).amin(1)
        negative = -least
        collectives.max_ranks(negative, self._group, self._meter)
        return -negative


@lru_cache(maxsize=1024)
def _shares(
    owners: tuple[int, ...], rank: int, ranks: int, which: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many of the matrices ``which`` are each rank's; the places of the rank's among all its.

    Once for all steps.
    """
    counts = [0] * ranks
    for k in which:
        counts[owners[k]] += 1
    asked = set(which)
    rank_owns = (k for k, owner in enumerate(owners) if owner == rank)
    return tuple(counts), tuple(place for place, k in enumerate(rank_owns) if k in asked)


def _counts(bits: Tensor, prefix: Tensor, width: int, digit: int) -> Tensor:
    """How many of each row begin with ``prefix`` and each next digit, (k, 2^digit) int64.

    ``width``: bits that are behind the prefix, digit included.
    """
    rest = bits >> (width - digit)
    size = 1 << digit
    # what begins otherwise is counted in a bin that is cut off
    index = torch.where(rest >> digit == prefix[:, None], rest & (size - 1), size).long()
    counts = torch.zeros(len(bits), size + 1, dtype=torch.int64, device=bits.device)
    one = torch.ones((), dtype=torch.int64, device=bits.device)
    return counts.scatter_add_(1, index, one.expand(index.shape))[:, :size].contiguous()


def fold(r: Tensor) -> Tensor:
    """Half of each symmetric matrix, diagonal included: (k, s, s) -> (k, s (s + 1) / 2).

    With h = s // 2: the h x (s - h) corner, then a rectangle of the two triangles beside it, the
    lower one turned against the upper one. Copies of rectangles, and no tables of indices.
    """
    k, s = r.shape[:2]
    h = s // 2
    half = r.new_empty(k, s * (s + 1) // 2)
    half[:, : h * (s - h)].view(k, h, s - h).copy_(r[:, :h, h:])
    both = half[:, h * (s - h) :].view(k, s - h, h + 1)
    both[:, :, s - h :] = 0.0
    both[:, :, : s - h] = r[:, h:, h:].tril()
    both[:, :h, 1:] += r[:, :h, :h].triu()
    return half


def unfold(half: Tensor, s: int) -> Tensor:
    """The inverse: (k, s, s)."""
    k, h = len(half), s // 2
    corner = half[:, : h * (s - h)].view(k, h, s - h)
    both = half[:, h * (s - h) :].view(k, s - h, h + 1)
    r = half.new_empty(k, s, s)
    r[:, :h, h:] = corner
    r[:, h:, :h] = corner.mT
    low, up = both[:, :, : s - h].tril(), both[:, :h, 1:].triu()
    r[:, h:, h:] = low + low.tril(-1).mT
    r[:, :h, :h] = up + up.triu(1).mT
    return r
