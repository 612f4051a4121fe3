"""What a rule may do with the matrices in hand: whole ones at their owner, or slabs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from spectral_dist.polar import of_gram, polar, reductions, resolve_dtype
from spectral_dist.sharding.gram import Reduction


class Watch(Protocol):
    """What a monitor wants to see of one step; see ``spectral_dist.monitor``."""

    def factors(self, which: Sequence[int], matrices: Tensor, factors: Tensor) -> None:
        """What was orthogonalized at this owner, and what came out."""

    def grams(
        self, which: Sequence[int], of_matrices: Tensor, of_factors: Tensor, nuclear: Tensor
    ) -> None:
        """The Grams of both, of the short side, and <X, U>."""

    def note(self, which: Sequence[int], name: str, values: Tensor) -> None:
        """A number for each matrix."""

    def runs(
        self, which: Sequence[int], weights: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> None:
        """Runs of weights, still unchanged, and of their directions."""


class Handle:
    """What a rule may do with whole matrices at their owner; counts polar factors."""

    def __init__(
        self,
        group: dict[str, Any],
        all_names: Sequence[str],
        observers: Sequence[Callable[[Sequence[str], Tensor], None]],
        watch: Watch | None = None,
    ) -> None:
        self.group, self.observers, self.watch = group, observers, watch
        self.all_names = all_names
        self.names: Sequence[str] = ()
        """of the matrices in hand"""
        self.which: Sequence[int] = ()
        """the matrices in hand"""
        self.shape = (0, 0)
        """theirs"""
        self.state: Mapping[str, Tensor] = {}
        """theirs"""
        self.polar_calls = 0

    def take(
        self, which: Sequence[int], shape: tuple[int, int], state: Mapping[str, Tensor]
    ) -> None:
        """Have these matrices in hand."""
        self.which, self.shape, self.state = which, shape, state
        self.names = [self.all_names[i] for i in which]

    def polar(self, matrices: Tensor, rows: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Their polar factors, by the group's method, or by these (a, b, c)."""
        self.polar_calls += len(matrices)
        for observer in self.observers:
            observer(self.names, matrices)
        factors = polar(
            matrices,
            method=self.group["polar"] if rows is None else rows,
            steps=self.group["polar_steps"] if rows is None else None,
            compute_dtype=self.group["polar_dtype"],
        )
        if self.watch:
            self.watch.factors(self.which, matrices, factors)
        return factors

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Their inner products, (k,)."""
        return reductions.inner(a, b)

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """The q-quantile of each one's elements, (k,)."""
        return reductions.quantile(magnitudes, q)

    def fraction(self, which: Tensor) -> Tensor:
        """The fraction of each one's elements that are true, (k,)."""
        return which.mean((1, 2), dtype=torch.float32)

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """What ``evaluate`` makes of them: there is one slab."""
        return evaluate(parts, list(range(len(self.which)) if among is None else among))

    def orthogonalized(self, places: list[int] | None, matrices: Tensor, factors: Tensor) -> None:
        """Count what was orthogonalized without ``polar``; show it to those who watch."""
        found = range(len(self.which)) if places is None else places
        self.polar_calls += len(found)
        for observer in self.observers:
            observer([self.names[k] for k in found], matrices)
        if self.watch and found:
            self.watch.factors([self.which[k] for k in found], matrices, factors)

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Tell the monitor, if one watches this step."""
        if self.watch:
            self.watch.note(self.which, name, values())


class SlabHandle:
    """What a rule may do with matrices that lie in slabs over a group; as ``Handle``.

    ``handle``: of the unit, with the matrices in hand. A matrix counts, and is told to the monitor,
    at the rank that evaluates its polynomial.
    """

    def __init__(self, handle: Handle, reduction: Reduction) -> None:
        self._handle, self._reduction = handle, reduction
        self.shape, self.names, self.state = handle.shape, handle.names, handle.state

    def polar(self, matrices: Tensor, rows: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Slabs of their polar factors, by the group's method, or by these (a, b, c)."""
        group = self._handle.group
        method = group["polar"] if rows is None else rows
        steps = group["polar_steps"] if rows is None else None
        computed = resolve_dtype(method, group["polar_dtype"], matrices.dtype, matrices.device)
        dtype = of_gram.dtype_of(method, steps, computed)
        evaluate = partial(of_gram.multiplier, method=method, steps=steps)
        factors = self._reduction.multiply(matrices, dtype, evaluate)
        self.orthogonalized(None, matrices, factors)
        return factors

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Their inner products over all slabs, (k,)."""
        return self._reduction.add(reductions.inner(a, b))

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """The q-quantile of each one's elements, (k,)."""
        return self._reduction.quantile(magnitudes, q)

    def fraction(self, which: Tensor) -> Tensor:
        """The fraction of each one's elements that are true, (k,)."""
        count = self._reduction.add(which.sum((1, 2), dtype=torch.int64))
        return count.float() / (self.shape[0] * self.shape[1])

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """What ``evaluate`` makes of sums over slabs, each at its owner."""
        return self._reduction.at_owner(parts, evaluate, among)

    def orthogonalized(self, places: list[int] | None, matrices: Tensor, factors: Tensor) -> None:
        """As ``Handle``: ``places`` are among the matrices that are owned here."""
        mine, watch = self._reduction.mine, self._handle.watch
        if places is not None:
            self._handle.orthogonalized([mine[k] for k in places], matrices, factors)
            return
        self._handle.polar_calls += len(mine)
        if watch:
            found = [self._reduction.gram(x.float()) for x in (matrices, factors)]
            of_both = self._reduction.add(torch.stack(found))
            nuclear = self.inner(matrices, factors)
            if mine:
                watch.grams(self._mine(), *(x[mine] for x in (*of_both, nuclear)))

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Tell the monitor, if one watches this step."""
        if self._handle.watch:
            found = values()  # a call of all the group
            if self._reduction.mine:
                self._handle.watch.note(self._mine(), name, found[self._reduction.mine])

    def _mine(self) -> list[int]:
        return [self._reduction.matrices[k] for k in self._reduction.mine]
