"""One step of one unit's matrices: where a rule meets the exchange."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from spectral_dist.core.matrix_ops import SlabMatrixOps, StepContext, WholeMatrixOps
from spectral_dist.core.units import MatrixUnit
from spectral_dist.sharding.bucket_routes import pack
from spectral_dist.sharding.exchange import MatrixTask, Piece
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.matrix import Matrix


class MatrixStep(MatrixTask):
    """What a rule does with the matrices of one unit in one exchange.

    Args:
        context: the rule, its options, observers and monitor.
        unit: that is stepped.
        lr: learning rate.
        weights, grads, momenta: local tensors, in the order of the unit's; a gradient may be None.
            Momenta are empty if the rule has none.
    """

    def __init__(
        self,
        context: StepContext,
        unit: MatrixUnit,
        lr: float,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
    ) -> None:
        exchange = unit.exchange
        self.context, self.unit, self.lr = context, unit, lr
        self.rule, self.options = context.rule, context.options
        self.present = [grad is not None for grad in grads]
        self.all_present = all(self.present)
        self.absent = self._matrices_without_gradient()
        last = context.last_step
        self.skip: dict[str, Tensor] = {} if last is None else {"skip": last.skip}
        gradients = [
            torch.zeros_like(w) if g is None else g.contiguous()
            for w, g in zip(weights, grads, strict=True)
        ]
        self.grad_of = exchange.local_runs.views(gradients)
        self.weight_of = exchange.local_runs.views(weights)
        self.has_momentum = bool(momenta)
        self.momentum_of: dict[Piece, Tensor] = {}
        if unit.momentum_at_owner:
            for index, momentum in enumerate(momenta):
                self.momentum_of |= unit.momentum_runs.packed_views(index, momentum)
        elif self.has_momentum:
            self.momentum_of = exchange.local_runs.views(momenta)

    def update_input(self, pieces: list[Piece]) -> list[Tensor]:
        """Accumulate gradients of these runs, and return what is to be orthogonalized of them."""
        grads = self._accumulate(pieces)
        momenta = [self.momentum_of[p] for p in pieces] if self.has_momentum else []
        return self.rule.update_input(self.options, momenta, grads)

    def _accumulate(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Accumulate gradients into momentum, if there is one; return them in the state's dtype."""
        exchange = self.unit.exchange
        grads = [self.grad_of[p] for p in pieces]
        if any(g.dtype != exchange.state_dtype or g.device != exchange.state_device for g in grads):
            flat = pack(grads, exchange.state_dtype, exchange.state_device)
            runs = torch.split(flat, [g.numel() for g in grads])
            grads = [piece.shaped(run) for piece, run in zip(pieces, runs, strict=True)]
        if self.has_momentum:
            present = self._with_gradient(pieces)
            momenta = [self.momentum_of[pieces[i]] for i in present]
            if present:
                values = [grads[i] for i in present]
                self.rule.accumulate(self.options, momenta, values, **self.skip)
        return grads

    def _with_gradient(self, pieces: Sequence[Piece]) -> Sequence[int]:
        """Return the places of the runs whose parameter has a gradient."""
        if self.all_present:
            return range(len(pieces))
        return [i for i, p in enumerate(pieces) if self.present[p.tensor]]

    def direction(self, matrices: Tensor, which: Sequence[int]) -> Tensor:
        """Return the rule's direction of a batch of whole matrices."""
        matrices = self._read(matrices, which)
        shape = (matrices.shape[-2], matrices.shape[-1])
        with self._state_of(which, range(len(which))) as state:
            ops = WholeMatrixOps(self.context, which, shape, state)
            direction = self._checked(self.rule.direction(self.options, matrices, ops), matrices)
            return self._read(direction, which)

    def slab_direction(self, slabs: Tensor, reduction: Reduction) -> Tensor:
        """Return this rank's slabs of the rule's direction; a collective call of the group."""
        which = reduction.matrices
        if self._matrix(which[0]).transposed:
            reduction = reduction.transposed()
        slabs = self._read(slabs, which)
        with self._state_of(which, reduction.owned) as state:
            ops = SlabMatrixOps(self.context, reduction, state)
            direction = self._checked(self.rule.direction(self.options, slabs, ops), slabs)
            return self._read(direction, which)

    def _matrix(self, index: int) -> Matrix:
        """Return one of the unit's matrices."""
        return self.unit.located.layouts[index].matrix

    def _read(self, matrices: Tensor, which: Sequence[int]) -> Tensor:
        """Transpose a batch whose matrices are stored transposed; return any other unchanged."""
        return matrices.mT.contiguous() if self._matrix(which[0]).transposed else matrices

    def _checked(self, direction: Tensor, matrices: Tensor) -> Tensor:
        """Return a rule's direction; raise a RuntimeError if its shape is not that of matrices."""
        if direction.shape != matrices.shape:
            raise RuntimeError(
                f"{type(self.rule).__name__}.direction returned {tuple(direction.shape)} for"
                f" matrices of {tuple(matrices.shape)}"
            )
        return direction

    @contextmanager
    def _state_of(
        self, which: Sequence[int], owned: Sequence[int]
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield a batch's state, and afterwards restore that of matrices without a gradient.

        Args:
            which: the batch.
            owned: the places in the batch of the matrices that this rank owns.
        """
        state = self.unit.state
        if state is None:
            yield {}
            return
        absent = [k for k, matrix in enumerate(which) if matrix in self.absent]
        before = state.copies(which, owned, absent) if absent else []
        guarded = {name: t.clone() for name, t in state.of(which).items()} if self.skip else {}
        yield state.of(which)
        for name, kept in guarded.items():
            self._guard(state.of(which)[name], kept)
        for parts, values in before:
            if parts:
                torch._foreach_copy_(parts, values)

    def _guard(self, tensor: Tensor, before: Tensor) -> None:
        """Restore a tensor, on the device, if the step is skipped; the host's own once it knows."""
        last = self.context.last_step
        assert last is not None
        if tensor.device == last.skip.device:
            torch.where(last.skip > 0, before, tensor, out=tensor)
        else:
            last.undo.append(partial(tensor.copy_, before))

    def _matrices_without_gradient(self) -> set[int]:
        """Return the indices of matrices of this rank's parameters that have no gradient.

        The ranks have agreed that such a parameter has none on any rank.
        """
        without = {i for i, present in enumerate(self.present) if not present}
        layouts = self.unit.located.layouts if without else ()
        return {i for i, layout in enumerate(layouts) if layout.tiles[0].tensor in without}

    def apply(self, pieces: list[Piece], directions: list[Tensor]) -> None:
        """Update the weights of these runs by their directions.

        Where every replica stores momentum, that of matrices of other replicas is updated as well.
        """
        if (
            self.unit.exchange.num_replicas > 1
            and not self.unit.momentum_at_owner
            and self.has_momentum
        ):
            self._accumulate([p for p in pieces if p not in self.unit.owned_runs])
        present = self._with_gradient(pieces)
        if not present:
            return
        if self.context.watch:
            owned = [i for i in present if pieces[i] in self.unit.owned_runs]
            self.context.watch.record_update(
                [pieces[i].matrix for i in owned],
                [self.weight_of[pieces[i]] for i in owned],
                [directions[i] for i in owned],
            )
        self.rule.update_weights(
            self.options,
            self.lr,
            [self.weight_of[pieces[i]] for i in present],
            [directions[i] for i in present],
            [self.unit.read_shapes[pieces[i].matrix] for i in present],
            **self.skip,
        )
