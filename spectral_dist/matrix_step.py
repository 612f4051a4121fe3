"""One step of one group's matrices: where a rule meets the exchange."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spectral_dist.handles import Handle, SlabHandle
from spectral_dist.matrix_state import MatrixState
from spectral_dist.rules.rule import Rule
from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import Exchange, Piece, Pieces
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.layout import Placement
from spectral_dist.sharding.plan import Plan


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
    state: MatrixState | None = None
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
        if self.plan is None or self.state is not None:
            return False
        return self.copies > 1 and not self.placement.everywhere

    @property
    def spread(self) -> bool:
        """Whether there is matrix state, of which this rank may not have all."""
        ranks = map(collectives.size, (self.placement.group, self.placement.replicas))
        return self.state is not None and max(ranks) > 1

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
        self.absent = self._without_gradient()
        self.home = exchange.home_device, exchange.home_dtype
        filled = [
            torch.zeros_like(w) if g is None else g.contiguous()
            for w, g in zip(weights, grads, strict=True)
        ]
        self.grad_of = exchange.stored.views(filled)
        self.weight_of = exchange.stored.views(weights)
        self.momentum_of: dict[Piece, Tensor] = {}
        if not rule.momentum:
            pass
        elif unit.alone:
            for index, momentum in enumerate(momenta):
                self.momentum_of |= unit.kept.packed_views(index, momentum)
        else:
            self.momentum_of = exchange.stored.views(momenta)
        self.own = set(exchange.given.pieces)

    def request(self, pieces: list[Piece]) -> list[Tensor]:
        """Accumulate, and what must be orthogonalized."""
        grads = self._accumulate(pieces)
        momenta = [self.momentum_of[p] for p in pieces] if self.rule.momentum else []
        return self.rule.request(self.group, momenta, grads)

    def _accumulate(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Put the gradients into the momentum, if there is one; them, as wide as it."""
        grads = [self.grad_of[p].to(*self.home) for p in pieces]
        if not self.rule.momentum:
            return grads
        kept = [i for i, p in enumerate(pieces) if self.present[p.tensor]]
        momenta = [self.momentum_of[pieces[i]] for i in kept]
        if kept:
            self.rule.accumulate(self.group, momenta, [grads[i] for i in kept])
        return grads

    def direction(self, matrices: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The rule's direction of a batch of whole matrices."""
        shape = (matrices.shape[-2], matrices.shape[-1])
        with self._in_hand(which, shape, range(len(which))):
            return self.rule.direction(self.group, matrices, self.handle)

    def slabs(self, slabs: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor | None]:
        """The rule's direction of a batch of slabs."""
        with self._in_hand(reduction.matrices, reduction.shape, reduction.mine):
            return self.rule.direction(self.group, slabs, SlabHandle(self.handle, reduction))

    @contextmanager
    def _in_hand(
        self, which: Sequence[int], shape: tuple[int, int], mine: Sequence[int]
    ) -> Iterator[None]:
        """The handle with these matrices; the state of those without gradient stays as it is."""
        state: Mapping[str, Tensor] = {}
        absent: list[int] = []
        if self.unit.state is not None:
            state = self.unit.state.of(which)
            absent = [k for k, matrix in enumerate(which) if matrix in self.absent]
        before = self.unit.state.saved(which, mine, absent) if self.unit.state and absent else []
        self.handle.take(which, shape, state)
        yield
        for tensor, rows, values in before:
            tensor[rows] = values

    def _without_gradient(self) -> set[int]:
        """Matrices of parameters that are here and have none, as they then have nowhere."""
        without = {i for i, present in enumerate(self.present) if not present}
        layouts = self.unit.placement.layouts if without else ()
        return {i for i, layout in enumerate(layouts) if layout.tiles[0].tensor in without}

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
        if self.unit.copies > 1 and not self.unit.alone and self.rule.momentum:
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
