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
"""Bits of a magnitude that one pass of ``Reduction.quantile`` finds, by (k, 2048) counts."""


class Reduction:
    """Whole-matrix quantities of one batch of slabs, computed by all ranks of the group.

    Attributes:
        matrices: the indices of the batch's layouts.
        shape: (m, n) of the whole matrices.
        along: the dimension along which they are cut: 0 for rows, 1 for columns.
        owned: the places in the batch of the matrices that this rank owns: it evaluates their
            polynomials, and is the one to report and to save what belongs to them.
        begin, length: of this rank's slabs, along the matrices' long side.
    """

    def __init__(self, batch: SlabBatch, group: Group, meter: Meter) -> None:
        self.matrices, self.shape = batch.matrices, batch.shape
        self.along = batch.cut.along
        self._group, self._meter = group, meter
        self._rank, self._ranks = collectives.rank(group), collectives.size(group)
        self._owners = batch.owners
        self.owned = [k for k, owner in enumerate(batch.owners) if owner == self._rank]
        self.begin, self.length = batch.box[self.along], batch.box[2 + self.along]

    def transposed(self) -> Reduction:
        """Return the reduction of the matrices' transposes."""
        transposed = copy.copy(self)
        transposed.shape, transposed.along = (self.shape[1], self.shape[0]), 1 - self.along
        return transposed

    def add(self, values: Tensor) -> Tensor:
        """Replace values by their sum over all ranks, and return them."""
        collectives.sum_ranks(values, self._group, self._meter)
        return values

    def gram(self, x: Tensor) -> Tensor:
        """Return the Gram matrices of this rank's own slabs, (k, s, s); nothing is sent.

        They are of the short side: their sum over all ranks is X X^T or X^T X of whole matrices.
        """
        return torch.bmm(x, x.mT) if self.along else torch.bmm(x.mT, x)

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """Sum every rank's parts at the matrices' owners, evaluate there, and return all results.

        Of j matrices that divide evenly over P ranks, (P - 1)/P j times the elements of a part, and
        of a result, leave a rank.

        Args:
            parts: (j, ...), this rank's part for each matrix.
            evaluate: called with the sums (j', ...) of the matrices that this rank owns, added in
                the order of ranks, and with their places in ``owned``; returns (j', ...), which is
                sent unless it has no elements.
            among: the places in the batch of the j matrices, ascending; None: all.

        Returns:
            (j, ...), the results for all j matrices, on every rank.
        """
        which = tuple(range(len(self._owners)) if among is None else among)
        counts, owned_places = _counts_and_places(self._owners, self._rank, self._ranks, which)
        places = list(owned_places)
        sums = self._collect(parts.reshape(len(parts), -1), counts)
        results = evaluate(sums.view(len(places), *parts.shape[1:]), places)
        flat = results.reshape(len(places), math.prod(results.shape[1:]))
        return self._return(flat, counts).view(len(parts), *results.shape[1:])

    def multiply(
        self, x: Tensor, dtype: torch.dtype, evaluate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return this rank's slabs of Q X for each matrix, with Q = evaluate(X X^T).

        Of each Gram matrix and of its Q only the half travels: for each matrix, s (s + 1) numbers.

        Args:
            x: this rank's slabs, (k, rows, columns).
            dtype: of the Gram matrices and of products.
            evaluate: from the Gram matrices G, (k', s, s), of the matrices that this rank owns,
                which it may overwrite, to their symmetric Q, (k', s, s). It is called with G / c^2
                where X has been divided by c, so evaluate(G / c^2) must be c evaluate(G).

        Returns:
            (k, rows, columns), in X's dtype.
        """
        wide = self._bounded(x.to(dtype), x.dtype)
        gram = self.gram(wide)
        side = gram.shape[-1]
        half = self.at_owner(fold(gram), lambda sums, _: fold(evaluate(unfold(sums, side))))
        q = unfold(half, side)
        product = torch.bmm(q, wide) if self.along else torch.bmm(wide, q)
        return product.to(x.dtype)

    def _bounded(self, wide: Tensor, narrow: torch.dtype) -> Tensor:
        """Divide slabs by the largest entry of their matrix.

        So squares neither overflow nor vanish.
        They are returned unscaled if squares of the narrow dtype cannot overflow in the wide one.

        Args:
            wide: slabs in the dtype of the products.
            narrow: the dtype that they came in.
        """
        if torch.finfo(narrow).max < torch.finfo(wide.dtype).max ** 0.25:
            return wide
        largest = wide.new_zeros(len(wide))
        if wide.numel():  # two reductions, not vector_norm(inf): that is ten times slower on CPUs
            largest = torch.maximum(wide.amax((-2, -1)), -wide.amin((-2, -1)))
        collectives.max_ranks(largest, self._group, self._meter)
        return wide / largest.clamp_min(torch.finfo(wide.dtype).tiny)[:, None, None]

    def _collect(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the sums over all ranks of the rows that are this rank's.

        Args:
            rows: (j, numel), ordered by the rank that gets each.
            counts: how many rows each rank gets.
        """
        numel, num_owned = rows.shape[1], counts[self._rank]
        received = collectives.all_to_all(
            rows.reshape(-1),
            [count * numel for count in counts],
            [num_owned * numel] * self._ranks,
            self._group,
            self._meter,
        )
        return received.wait().view(self._ranks, num_owned, numel).sum(0)

    def _return(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, in the order of ranks; ``counts``: how many each has."""
        numel, flat = rows.shape[1], rows.reshape(-1)
        if not numel:
            return rows.new_empty(sum(counts), 0)
        if len(set(counts)) == 1:
            gathered = collectives.all_gather(flat, self._group, self._meter)
        else:  # a gather would pad
            gathered = collectives.all_to_all(
                flat.repeat(self._ranks),
                [flat.numel()] * self._ranks,
                [count * numel for count in counts],
                self._group,
                self._meter,
            )
        return gathered.wait().view(-1, numel)

    def quantile(self, x: Tensor, q: float) -> Tensor:
        """Return the q-quantile of each whole matrix's elements, (k,).

        It equals, bit by bit, that of the matrices in one process. The order statistic below the
        quantile is found digit by digit of its bits; the one above is the next larger number.

        Args:
            x: this rank's slabs, (k, rows, columns): magnitudes in float32 or float64, so that
                their bits are ordered as they are.
            q: from 0 to 1.
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
            cumulative = counts.cumsum(1)
            value_of_digit = (cumulative <= target[:, None]).sum(1)
            ties = counts.gather(1, value_of_digit[:, None])[:, 0]
            target = target - (cumulative.gather(1, value_of_digit[:, None])[:, 0] - ties)
            prefix = (prefix << digit) + value_of_digit.to(bits.dtype)
            width -= digit
            del counts, cumulative  # else they are held while the next digit is counted
        value = prefix.view(x.dtype)
        if position == low:
            return value
        above = self._next(bits, prefix)
        above = torch.where(target + 1 < ties, prefix, above).view(x.dtype)
        return torch.lerp(value, above, position - low)

    def _next(self, bits: Tensor, than: Tensor) -> Tensor:
        """Return the smallest bits on any rank that are larger than ``than``, (k,).

        If there are none: the largest number of the dtype of ``bits``.
        """
        none = torch.iinfo(bits.dtype).max
        least = torch.full_like(than, none)
        if bits.numel():
            least = bits.masked_fill(bits <= than[:, None], none).amin(1)
        negative = -least
        collectives.max_ranks(negative, self._group, self._meter)
        return -negative


@lru_cache(maxsize=1024)
def _counts_and_places(
    owners: tuple[int, ...], rank: int, ranks: int, which: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count how many of some matrices each rank owns, and find those of one rank.

    Args:
        owners: of all matrices of a batch.
        rank: the rank whose matrices are looked for.
        ranks: the number of ranks.
        which: the places of the matrices in the batch.

    Returns:
        The number that each rank owns; and for those of ``rank``, their places among all matrices
        of the batch that it owns.
    """
    counts = [0] * ranks
    for k in which:
        counts[owners[k]] += 1
    selected = set(which)
    owned = (k for k, owner in enumerate(owners) if owner == rank)
    return tuple(counts), tuple(place for place, k in enumerate(owned) if k in selected)


def _counts(bits: Tensor, prefix: Tensor, width: int, digit: int) -> Tensor:
    """Count the elements of each row whose bits begin with a prefix, by their next digit.

    Args:
        bits: (k, number of elements), of nonnegative floats, as integers.
        prefix: (k,), the leading bits.
        width: the number of bits behind the prefix, digit included.
        digit: the number of bits of the digit.

    Returns:
        (k, 2^digit), int64.
    """
    rest = bits >> (width - digit)
    size = 1 << digit
    # elements with another prefix are counted in an extra bin, which is cut off
    index = (rest & (size - 1)).masked_fill(rest >> digit != prefix[:, None], size).long()
    counts = torch.zeros(len(bits), size + 1, dtype=torch.int64, device=bits.device)
    one = torch.ones((), dtype=torch.int64, device=bits.device)
    return counts.scatter_add_(1, index, one.expand(index.shape))[:, :size].contiguous()


def fold(r: Tensor) -> Tensor:
    """Pack the half of each symmetric matrix, diagonal included: (k, s, s) -> (k, s (s + 1) / 2).

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
    """Return the symmetric matrices (k, s, s) that ``fold`` has packed: its inverse."""
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
