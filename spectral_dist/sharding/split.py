"""Newton-Schulz on matrices in the slabs of a team: every product is shared by the team's ranks.

Each step is that of one process, X <- a X + (b A + c A^2) X with A = X X^T: the team adds up its
slabs' parts of A, each rank computes some rows of b A + c A^2, and multiplies its own slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from spectral_dist.polar.scaling import unit_frobenius
from spectral_dist.polar.schedules import Row
from spectral_dist.sharding import collectives
from spectral_dist.sharding.gram import Reduction

HALF = (torch.float16, torch.bfloat16)


class SplitReduction(Reduction):
    """Whole-matrix quantities of one batch of slabs of a team, and its Newton-Schulz iteration."""

    def newton_schulz(
        self, x: Tensor, rows: Sequence[Row], safety: float, dtype: torch.dtype
    ) -> Tensor:
        """Return this rank's slabs of the matrices' polar factors; a collective call of the team.

        For each matrix and step 3 (P - 1)/P s^2 numbers leave a rank, or a third less if c is 0,
        with s the short side and P the ranks of the team: parts of A in float32 at least, then
        rows of A and of b A + c A^2 in ``dtype``.

        Args:
            x: this rank's slabs, (k, rows, columns).
            rows: (a, b, c) of every step.
            safety: singular values begin at 1 / safety at most.
            dtype: in which the iteration is.
        """
        y = unit_frobenius(x, dtype, safety, over=self)
        for a, b, c in rows:
            mine = self._gram_rows(y)
            gram = self._all_rows(mine)
            poly = gram * b
            if c:
                poly = self._all_rows(torch.baddbmm(mine, mine, gram, beta=b, alpha=c))
            left, right = (poly, y) if self.along else (y, poly)
            y = torch.baddbmm(y, left, right, beta=a)
        return y.to(x.dtype)

    def largest(self, values: Tensor) -> Tensor:
        """Replace values by the largest on any rank, and return them."""
        collectives.max_ranks(values, self._group, self._meter)
        return values

    def _gram_rows(self, y: Tensor) -> Tensor:
        """Return this rank's rows of the matrices' Grams, (k, rows of this rank, s), in y's dtype.

        They are added up in float32 at least, in the order of ranks, and rounded once.
        """
        parts = self._wide_gram(y)
        counts = self._row_counts(parts.shape[-1])
        # rank by rank, and for each of them matrix by matrix
        by_rank = torch.cat([part.reshape(-1) for part in torch.split(parts, counts, dim=1)])
        numel = len(y) * parts.shape[-1]
        received = collectives.all_to_all(
            by_rank,
            [count * numel for count in counts],
            [counts[self._rank] * numel] * self._ranks,
            self._group,
            self._meter,
        )
        shape = (self._ranks, len(y), counts[self._rank], parts.shape[-1])
        sums = received.wait().view(shape).sum(0)
        return sums.to(y.dtype)

    def _wide_gram(self, y: Tensor) -> Tensor:
        """Return the Gram matrices of this rank's own slabs, in float32 at least."""
        if y.dtype not in HALF:
            return self.gram(y)
        if y.device.type == "cpu":
            return self.gram(y.float())
        left, right = (y, y.mT) if self.along else (y.mT, y)
        # products of half precision that come out wide: float32 ones take eight times as long
        return torch.bmm(left, right, out_dtype=torch.float32)

    def _all_rows(self, mine: Tensor) -> Tensor:
        """Return the rows (k, s, s) of all ranks, given those of this one, (k, rows, s)."""
        side = mine.shape[-1]
        counts = self._row_counts(side)
        flat = mine.reshape(-1)
        if len(set(counts)) == 1:
            gathered = collectives.all_gather(flat, self._group, self._meter).wait()
        else:
            gathered = collectives.all_to_all(
                flat.repeat(self._ranks),
                [flat.numel()] * self._ranks,
                [count * len(mine) * side for count in counts],
                self._group,
                self._meter,
            ).wait()
        parts = torch.split(gathered, [count * len(mine) * side for count in counts])
        each = [part.view(len(mine), n, side) for part, n in zip(parts, counts, strict=True)]
        return torch.cat(each, dim=1)

    def _row_counts(self, side: int) -> list[int]:
        """Return how many rows of a Gram matrix each rank computes."""
        edges = [side * rank // self._ranks for rank in range(self._ranks + 1)]
        return [end - begin for begin, end in pairwise(edges)]
