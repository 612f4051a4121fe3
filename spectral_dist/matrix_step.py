"""One step of one group's matrices: where a rule meets the exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from spectral_dist.polar import of_gram, polar, reductions, resolve_dtype
from spectral_dist.rules.rule import Rule
from spectral_dist.sharding.exchange import Exchange, Piece, Pieces
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.layout import Placement
from spectral_dist.sharding.plan import Plan


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


@dataclass(frozen=True)
class Unit:
    """Parameters of a group that lie alike, and for matrices their plan and exchange.

    ``blocks``: under strategy ``block``, the same parameters as matrices of their own block by
    block, for all steps but every ``period``-th; momentum lies the same in both.
    """

    placement: Placement
    tensors: tuple[int, ...]
    """their indices in the group"""
    plan: Plan | None = None
    exchange: Exchange | None = None
    blocks: Unit | None = None
    period: int = 1

    def at(self, step: int) -> Unit:
        """What a step works on, counted from 1: this, or its blocks."""
        return self if self.blocks is None or step % self.period == 0 else self.blocks

    def check_observers(self, count: int) -> None:
        """ValueError if there are observers, but no whole matrices to show them."""
        if count and (self.blocks or (self.plan and "gram" in self.plan.strategies)):
            raise ValueError(
                "an observer (calibrate's recorder, or one of your own) gets whole matrices, but"
                " under strategy 'gram' or 'block' no rank has them; build the optimizer with"
                " strategy='owner'"
            )

    @cached_property
    def alone(self) -> bool:
        """Whether momentum is kept by the owner's replica alone."""
        return self.plan is not None and self.copies > 1 and not self.placement.everywhere

    @cached_property
    def names(self) -> list[str]:
        """Of its matrices."""
        return [layout.matrix.name for layout in self.placement.layouts]

    @property
    def copies(self) -> int:
        """Replicas of every shard."""
        return 1 if self.exchange is None else self.exchange.copies

    @cached_property
    def kept(self) -> Pieces:
        """This rank's runs of matrices whose momentum it keeps."""
        assert self.exchange is not None
        return self.exchange.given if self.alone else self.exchange.stored

    def momentum(self, index: int, weight: Tensor, local: Tensor) -> Tensor:
        """Zeros for tensor ``index``, in float32 or wider.

        As the weight (a DTensor if it is one), but at the owner alone: the runs of its matrices one
        after the other, in the local tensor's shape if they are all of it.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not self.alone:
            return torch.zeros_like(weight, dtype=dtype)
        numel = self.kept.numel.get(index, 0)
        if numel == local.numel():
            return torch.zeros_like(local, dtype=dtype)
        return local.new_zeros(numel, dtype=dtype)


class Handle:
    """What a rule may do with whole matrices at their owner; counts polar factors."""

    def __init__(
        self,
        group: dict[str, Any],
        names: Sequence[str],
        observers: Sequence[Callable[[Sequence[str], Tensor], None]],
        watch: Watch | None = None,
    ) -> None:
        self.group, self.names, self.observers, self.watch = group, names, observers, watch
        self.which: Sequence[int] = ()
        """the matrices in hand"""
        self.shape = (0, 0)
        """theirs"""
        self.polar_calls = 0

    def polar(self, matrices: Tensor, rows: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Their polar factors, by the group's method, or by these (a, b, c)."""
        self.polar_calls += len(matrices)
        for observer in self.observers:
            observer([self.names[i] for i in self.which], matrices)
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
        self.shape = reduction.shape

    def polar(self, matrices: Tensor, rows: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Slabs of their polar factors, by the group's method, or by these (a, b, c)."""
        group, watch = self._handle.group, self._handle.watch
        method = group["polar"] if rows is None else rows
        steps = group["polar_steps"] if rows is None else None
        computed = resolve_dtype(method, group["polar_dtype"], matrices.dtype, matrices.device)
        dtype = of_gram.dtype_of(method, steps, computed)
        evaluate = partial(of_gram.multiplier, method=method, steps=steps)
        factors = self._reduction.multiply(matrices, dtype, evaluate)
        self._handle.polar_calls += len(self._reduction.mine)
        if watch:
            found = [self._reduction.gram(x.float()) for x in (matrices, factors)]
            of_both = self._reduction.add(torch.stack(found))
            nuclear = self.inner(matrices, factors)
            mine = self._reduction.mine
            if mine:
                watch.grams(self._mine(), *(x[mine] for x in (*of_both, nuclear)))
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

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Tell the monitor, if one watches this step."""
        if self._handle.watch:
            found = values()  # a call of all the group
            if self._reduction.mine:
                self._handle.watch.note(self._mine(), name, found[self._reduction.mine])

    def _mine(self) -> list[int]:
        return [self._reduction.matrices[k] for k in self._reduction.mine]


class MatrixStep:
    """A rule's part in one exchange of one unit: ``exchange.Work``.

    Args:
        weights, grads, momenta: local tensors, in the order of the unit's; a gradient may be None.
    """

    def __init__(
        self,
        rule: Rule,
        group: dict[str, Any],
        unit: Unit,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        handle: Handle,
    ) -> None:
        exchange = unit.exchange
        assert exchange is not None
        self.rule, self.group, self.unit, self.handle = rule, group, unit, handle
        self.numbers = rule.absorbs(group)
        self.absorbs = self.numbers and unit.alone
        self.present = [grad is not None for grad in grads]
        self.home = exchange.home_device, exchange.home_dtype
        filled = [
            torch.zeros_like(w) if g is None else g.contiguous()
            for w, g in zip(weights, grads, strict=True)
        ]
        self.grad_of = exchange.stored.views(filled)
        self.weight_of = exchange.stored.views(weights)
        self.momentum_of: dict[Piece, Tensor] = {}
        if unit.alone:
            for index, momentum in enumerate(momenta):
                self.momentum_of |= unit.kept.packed_views(index, momentum)
        else:
            self.momentum_of = exchange.stored.views(momenta)
        self.own = set(exchange.given.pieces)

    def request(self, pieces: list[Piece]) -> list[Tensor]:
        """Accumulate, and what must be orthogonalized."""
        grads = self._accumulate(pieces)
        return self.rule.request(self.group, [self.momentum_of[p] for p in pieces], grads)

    def _accumulate(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Put the gradients into the momentum; them, as wide as it."""
        grads = [self.grad_of[p].to(*self.home) for p in pieces]
        kept = [i for i, p in enumerate(pieces) if self.present[p.tensor]]
        momenta = [self.momentum_of[pieces[i]] for i in kept]
        if kept:
            self.rule.accumulate(self.group, momenta, [grads[i] for i in kept])
        return grads

    def direction(self, matrices: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The rule's direction of a batch of whole matrices."""
        self.handle.which, self.handle.shape = which, (matrices.shape[-2], matrices.shape[-1])
        return self.rule.direction(self.group, matrices, self.handle)

    def slabs(self, slabs: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor | None]:
        """The rule's direction of a batch of slabs."""
        return self.rule.direction(self.group, slabs, SlabHandle(self.handle, reduction))

    def absorb(
        self, pieces: list[Piece], directions: list[Tensor], numbers: list[Tensor]
    ) -> list[Tensor]:
        """Momentum after the polar factor; a parameter without gradient keeps its own."""
        kept = [i for i, p in enumerate(pieces) if self.present[p.tensor]]
        result = list(directions)
        if not kept:
            return result
        found = self.rule.absorb(
            self.group,
            [self.momentum_of[pieces[i]] for i in kept],
            [directions[i] for i in kept],
            [numbers[i] for i in kept],
        )
        for i, value in zip(kept, found, strict=True):
            result[i] = value
        return result

    def settle(self, pieces: list[Piece], directions: list[Tensor], numbers: list[Tensor]) -> None:
        """Momentum of the other replicas' matrices where it is kept everywhere; the weights."""
        if self.unit.copies > 1 and not self.unit.alone:
            self._accumulate([p for p in pieces if p not in self.own])
        if self.numbers and not self.absorbs:
            directions = self.absorb(pieces, directions, numbers)
        layouts = self.unit.placement.layouts
        kept = [i for i, p in enumerate(pieces) if self.present[p.tensor]]
        if not kept:
            return
        weights = [self.weight_of[pieces[i]] for i in kept]
        if self.handle.watch:
            own = [i for i in kept if pieces[i] in self.own]
            self.handle.watch.runs(
                [pieces[i].matrix for i in own],
                [self.weight_of[pieces[i]] for i in own],
                [directions[i] for i in own],
            )
        self.rule.settle(
            self.group,
            self.group["lr"] * self.group["lr_ratio"],
            weights,
            [directions[i] for i in kept],
            [layouts[pieces[i].matrix].matrix.shape for i in kept],
        )
