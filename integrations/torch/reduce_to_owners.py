"""DistributedDataParallel without extra bytes: gradients of matrices are reduced to their owners.

Only a matrix's owner reads its gradient, so a reduction to the owner takes the place of the
all-reduce: w N numbers for 2 w N, w = (P - 1) / P. With the all-gather of directions, w N more,
that is what the all-reduce of plain DistributedDataParallel sends by itself.
"""

# No `from __future__ import annotations`: torch compares a hook's annotations with its own types.

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import TensorWeakRef

from spectral_dist._error_help import explained
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.integrations.torch.ddp_hooks import replicated_units, set_hook
from spectral_dist.sharding import collectives
from spectral_dist.sharding.bucket_routes import Piece
from spectral_dist.sharding.collectives import Meter

GradBucket: TypeAlias = dist.GradBucket  # type: ignore[attr-defined,name-defined]
EVERY_RANK = -1
"""In place of an owner: every rank needs the average."""


@explained
def reduce_to_owners(
    model: DistributedDataParallel, optimizer: SpectralOptimizer
) -> "OwnerReduction":
    """Make ``model`` reduce each matrix's gradient to the matrix's owner only.

    Call it on every rank, before training. On the other ranks a matrix's ``.grad`` is then zero but
    for one element, the norm of the averaged gradient: norms of gradients are right on every rank,
    their elements at the owner only. Clip with the ``clip_grad_norm_`` of what is returned.

    Args:
        model: whose communication hook is set.
        optimizer: of the model's parameters.

    Returns:
        The hook, which clips, and whose ``meter`` counts what it sends.

    Raises:
        ValueError: the optimizer has no matrices, keeps their momentum on every rank or is not that
            of this model, or the model has another communication hook.
    """
    return OwnerReduction(model, optimizer)


@dataclass(frozen=True, eq=False)
class OwnedPart:
    """A part of a parameter that has one owner: matrices, or a rank's slab of one (``split``).

    Attributes:
        parameter: the parameter.
        owner: the rank in the model's process group.
        piece: of the flattened parameter.
    """

    parameter: Tensor
    owner: int
    piece: Piece

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of a contiguous tensor that is shaped as the parameter."""
        return self.piece.view(tensor.view(-1))

    def first(self, tensor: Tensor) -> Tensor:
        """Return the part's first element of such a tensor, 0-d."""
        return tensor.view(-1)[self.piece.start]


class OwnerReduction:
    """The communication hook of one model; see ``reduce_to_owners``.

    Attributes:
        group: the model's process group.
        parts: all matrices of the model, in the same order on every rank.
        meter: calls of the hook's collectives, and the bytes that this rank has sent by them, as a
            ring sends an all-reduce, and a chain a reduction.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: SpectralOptimizer) -> None:
        kinds = {group.get("kind") for group in optimizer.param_groups}
        if not isinstance(optimizer, SpectralOptimizer) or "matrix" not in kinds:
            raise ValueError(
                "reduce_to_owners is for optimizers that have matrices (Muon, SUMO and others), and"
                f" this {type(optimizer).__name__} has none; leave it out"
            )
        if optimizer.options.replicate_momentum:
            raise ValueError(
                "reduce_to_owners: replicate_momentum is True, but ranks that do not own a matrix"
                " have no gradient for its momentum; write replicate_momentum=False"
            )
        groups = replicated_units(model, optimizer, "reduce_to_owners")
        self.group: dist.ProcessGroup = model.process_group
        self.meter = Meter()
        self._rank, self._num_ranks = collectives.rank(self.group), collectives.size(self.group)
        self._global_ranks = dist.get_process_group_ranks(self.group)
        self._optimizer = optimizer
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = list(model.parameters())
        self._reduced: dict[int, tuple[TensorWeakRef, int]] = {}
        self.parts: list[OwnedPart] = []
        self._parts_of: dict[int, list[OwnedPart]] = {}
        if self._num_ranks == 1:
            warnings.warn(
                "reduce_to_owners has no effect: no other rank holds the same parameters",
                stacklevel=4,
            )
            return
        for group, units in groups:
            for unit in units:
                owned = [
                    (piece, owner)
                    for route in unit.exchange.routes
                    for owner, pieces in enumerate(route.runs_of_replicas)
                    for piece in pieces
                ]
                for piece, owner in sorted(owned, key=lambda x: (x[0].tensor, x[0].start)):
                    parameter = group["params"][unit.tensors[piece.tensor]]
                    self._add(OwnedPart(parameter, owner, piece))
        self.parts = [part for parts in self._parts_of.values() for part in parts]
        float16 = [part.parameter for part in self.parts if part.parameter.dtype == torch.float16]
        if float16:
            raise ValueError(
                f"reduce_to_owners: {self._names[id(float16[0])]} is float16, in which the norm of"
                " a gradient overflows; train in bfloat16 or float32"
            )
        set_hook(model, self, OwnerReduction.reduce, "reduce_to_owners")
        for p in self._parameters:
            if p.requires_grad:
                p.register_hook(  # type: ignore[no-untyped-call]
                    partial(self._before_accumulation, p)
                )
        optimizer.checks.append(self._check)

    def _add(self, part: OwnedPart) -> None:
        """Add a part, joined with the one before it in its parameter if both have one owner."""
        parts = self._parts_of.setdefault(id(part.parameter), [])
        last, piece = parts[-1] if parts else None, part.piece
        if last and last.owner == part.owner and last.piece.is_run and piece.is_run:
            before = last.piece
            if before.end == piece.start:
                joined = replace(before, length=before.length + piece.length)
                parts[-1] = replace(last, piece=joined)
                return
        parts.append(part)

    # -- in the backward pass

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average a bucket's gradients at the ranks that need them; DDP's hook.

        Returns:
            A future of the bucket's buffer, in which the averages then are, and zeros for matrices
            of other owners.
        """
        buffer = bucket.buffer().mul_(1 / self._num_ranks)  # as DDP itself averages
        parts = sorted(self._parts(bucket), key=lambda part: part[0])
        owners = sorted({owner for owner, _ in parts})
        # one copy of a bucket of several owners puts together what each of them gets
        is_copied = len(owners) > 1
        flat = torch.cat([part.reshape(-1) for _, part in parts]) if is_copied else buffer
        sizes = [sum(p.numel() for o, p in parts if o == owner) for owner in owners]
        works = [
            self._begin(owner, tensor)
            for owner, tensor in zip(owners, torch.split(flat, sizes), strict=True)
        ]

        def write_back(future: torch.futures.Future[Any]) -> Tensor:
            future.value()  # raises the collective's error
            for work in works[:-1]:
                work.wait()
            averages = torch.split(flat, [part.numel() for _, part in parts])
            kept, others = [], []
            for (owner, part), average in zip(parts, averages, strict=True):
                if owner in (EVERY_RANK, self._rank):
                    kept.append((part, average.view(part.shape)))
                else:
                    others.append(part)
            if kept and is_copied:
                torch._foreach_copy_([part for part, _ in kept], [average for _, average in kept])
            if others:
                torch._foreach_zero_(others)
            result: Tensor = bucket.buffer()
            return result

        if bucket.is_last():
            # ours runs before DDP's, which writes the gradients; what it queues runs after that
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(engine.queue_callback, self._after_reduction))
        averaged: torch.futures.Future[Tensor] = works[-1].get_future().then(write_back)
        return averaged

    def _parts(self, bucket: GradBucket) -> Iterator[tuple[int, Tensor]]:
        """Yield the owner and the gradient of each part of a bucket, as views of its buffer."""
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            parts = self._parts_of.get(id(parameter))
            if parts is None:
                yield EVERY_RANK, gradient
            for part in parts or ():
                yield part.owner, part.of(gradient)

    def _begin(self, owner: int, tensor: Tensor) -> dist.Work:
        """Begin to add up a flat tensor, at its owner or on every rank."""
        if owner == EVERY_RANK:
            sent = 2 * tensor.nbytes * (self._num_ranks - 1) // self._num_ranks
            self.meter.count("all_reduce", sent)
            work: dist.Work = dist.all_reduce(tensor, group=self.group, async_op=True)
        else:
            self.meter.count("reduce", tensor.nbytes * (owner != self._rank))
            root = self._global_ranks[owner]
            work = dist.reduce(tensor, root, group=self.group, async_op=True)
        return work

    def _after_reduction(self) -> None:
        """Write the norms of other owners' gradients into them; a collective call.

        It ends the backward pass, when DDP has written the gradients.
        """
        norms = self._norms([]).unbind()
        others = [
            (part.first(grad), norm)
            for part, norm in zip(self.parts, norms, strict=False)
            if (grad := part.parameter.grad) is not None and part.owner != self._rank
        ]
        if others:
            torch._foreach_copy_([first for first, _ in others], [norm for _, norm in others])
        self._remember()

    def _norms(self, replicated: Sequence[Tensor]) -> Tensor:
        """Return norms with the same bits on every rank, float64; a collective call.

        Args:
            replicated: gradients that every rank has whole.

        Returns:
            (parts + 1,): of each part's gradient, from its owner; of ``replicated`` together.
        """
        owned = [
            (part, part.of(grad))
            for part in self.parts
            if (grad := part.parameter.grad) is not None and part.owner == self._rank
        ]
        norm_of = dict(zip([part for part, _ in owned], _norms([g for _, g in owned]), strict=True))
        zero = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        last = zero
        if replicated and self._rank == 0:
            last = torch.linalg.vector_norm(torch.stack(_norms(replicated)))
        norms = torch.stack([*(norm_of.get(part, zero) for part in self.parts), last])
        self._begin(EVERY_RANK, norms).wait()
        return norms

    # -- between the backward pass and the step

    @explained
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients of the model so that their norm together is at most ``max_norm``.

        As ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)``, which would scale by
        factors that round differently on each rank. A collective call.

        Args:
            max_norm: the largest norm.

        Returns:
            The norm before, 0-d, the same on every rank.

        Raises:
            ValueError: the gradients were changed after they were reduced.
        """
        self._check()
        grads = [p.grad for p in self._parameters if p.grad is not None]
        replicated = [
            p.grad for p in self._parameters if p.grad is not None and id(p) not in self._parts_of
        ]
        total: Tensor = torch.linalg.vector_norm(self._norms(replicated))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        if grads:
            torch._foreach_mul_(grads, factor.float())
        self._remember()
        return total.float()

    def _remember(self) -> None:
        """Remember all gradients as they are now, to notice what else writes to them."""
        self._reduced = {
            id(p): (TensorWeakRef(p.grad), p.grad._version)
            for p in self._parameters
            if p.grad is not None and self._num_ranks > 1
        }

    def _is_as_reduced(self, parameter: Tensor) -> bool:
        """Return whether a parameter's gradient is what the last reduction or clipping left."""
        reference, version = self._reduced.get(id(parameter), (None, -1))
        grad = parameter.grad
        return reference is not None and reference() is grad and grad._version == version

    def _check(self) -> None:
        """Raise a ValueError if a gradient was not reduced, or was changed by something else."""
        for group in self._optimizer.param_groups if self._num_ranks > 1 else ():
            for p in group["params"]:
                if p.grad is None or id(p) not in self._names or self._is_as_reduced(p):
                    continue
                raise ValueError(
                    f"reduce_to_owners: the gradient of {self._names[id(p)]} was changed after it"
                    " was reduced, or was not reduced. Clip with the clip_grad_norm_ of what"
                    " reduce_to_owners returned, not with torch's, whose factor would round"
                    " differently on each rank; and leave the last backward() before step() outside"
                    " of no_sync()"
                )

    def _before_accumulation(self, parameter: Tensor, grad: Tensor) -> None:
        """Raise a ValueError if a backward pass is about to add to a reduced gradient.

        DDP would reduce the sum: at the owner that is right, but here it has one rank's weight.
        """
        with explained:
            if parameter.grad is not None and self._is_as_reduced(parameter):
                raise ValueError(
                    "reduce_to_owners: backward() would add to the gradient of"
                    f" {self._names[id(parameter)]}, which was reduced already. Call zero_grad()"
                    " after each step, and all backward passes of a step but the last inside of"
                    " no_sync()"
                )


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each tensor, float64, finite if the tensor's elements are."""
    if not tensors:
        return []
    if tensors[0].device.type == "cpu":  # where float64 takes eight times as long
        is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
        wide = torch.float64 if is_double else torch.float32
        norms = torch._foreach_norm(list(tensors), 2, dtype=wide)
        if bool(torch.stack(norms).isfinite().all()):
            return [norm.double() for norm in norms]
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))
