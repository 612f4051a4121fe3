"""What each rank keeps, sends and computes for one unit of matrices, from its layouts and plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.strategy import blocks_of, plan_of
from spectral_dist.estimate.engines import PlacedUnit
from spectral_dist.estimate.probe import Probe, probe_slab, probe_whole
from spectral_dist.rules.base import Rule, Shape
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.boxes import Slabs, slabs
from spectral_dist.sharding.layout import Layout, Tile
from spectral_dist.sharding.plan import Bucket, Plan

LEAST_STATE = torch.float32
"""State is at least this wide."""


@dataclass
class Counts:
    """What each rank has, (replicas, ranks of a replica) or what spreads to that.

    Attributes:
        momentum: elements of momentum.
        state_bytes: of matrix state.
        moved_bytes: what the rank sends to others in a step.
        polar_calls: matrices that it orthogonalizes.
        flops: of orthogonalization.
        temporary_bytes: the most that a step has at once beside state, weights and gradients.
    """

    momentum: Tensor
    state_bytes: Tensor
    moved_bytes: Tensor
    polar_calls: Tensor
    flops: Tensor
    temporary_bytes: Tensor


class MatrixCounter:
    """Counts for one unit of matrices.

    Args:
        rule: of the matrices.
        options: of the parameter group.
        unit: the matrices.
        plan: of the matrices.
        wire: the dtype in which they are sent.
        blocks: counts for their blocks, under strategy 'block'.
    """

    def __init__(
        self,
        rule: Rule[Any],
        options: MatrixOptions,
        unit: PlacedUnit,
        plan: Plan,
        wire: torch.dtype,
        blocks: MatrixCounter | None = None,
    ) -> None:
        self.rule, self.options, self.unit = rule, options, unit
        self.plan, self.wire, self.blocks = plan, wire, blocks
        self.layouts = unit.located.layouts
        self.ranks = collectives.size(unit.located.group)
        self.replicas = collectives.size(unit.located.replicas)
        self.state_dtype = torch.promote_types(unit.dtype, LEAST_STATE)
        self._probes: dict[Any, Probe] = {}

    @classmethod
    def of_unit(cls, rule: Rule[Any], options: MatrixOptions, unit: PlacedUnit) -> MatrixCounter:
        """Return what counts for a unit, with the plan that training makes."""
        plan, wire = plan_of(rule, options, unit.located, unit.dtype)
        blocks, counter = blocks_of(rule, options, unit.located, plan, wire), None
        if blocks is not None:
            located, block_plan = blocks
            counter = cls(rule, options, replace(unit, located=located), block_plan, wire)
        return cls(rule, options, unit, plan, wire, counter)

    def zeros(self) -> Tensor:
        """Return a zero for each rank, (replicas, ranks of a replica)."""
        return torch.zeros(self.replicas, self.ranks, dtype=torch.int64)

    def place(self, matrix: int) -> tuple[int, int]:
        """Return (replica, rank in it) of a matrix's owner."""
        return divmod(self.plan.owners[matrix], self.ranks)

    @cached_property
    def owned_runs(self) -> Tensor:
        """Return the elements of each rank's runs of the matrices that its replica owns."""
        return self.runs(range(len(self.layouts)))

    def runs(self, matrices: Sequence[int]) -> Tensor:
        """Return the elements of each rank's runs of those matrices that its replica owns."""
        runs = self.zeros()
        for i in matrices:
            replica, _ = self.place(i)
            ranks, numels, _ = shares(self.layouts[i].storage())
            runs[replica].index_add_(0, ranks, numels)
        return runs

    def count(self) -> Counts:
        """Return all counts; under strategy 'block' of a step on blocks, as most steps are."""
        momentum = torch.zeros(1, 1, dtype=torch.int64)
        located = self.unit.located
        if self.rule.has_momentum(self.options):
            at_owner = self.replicas > 1 and not located.replicate_momentum
            momentum = self.owned_runs if at_owner else self.unit.stored[None]
        state, calls, flops, moved = (self.zeros() for _ in range(4))
        for i, layout in enumerate(self.layouts):
            replica, rank = self.place(i)
            if self.plan.strategies[i] == "gram":
                self._count_in_slabs(layout, replica, rank, state, calls, flops, moved)
                continue
            probe = self.whole(layout)
            state[replica, rank] += self._state_bytes(layout.matrix.read_shape)
            calls[replica, rank] += probe.polar_calls
            flops[replica, rank] += probe.flops
        temporary = self.zeros()
        for bucket in self.plan.buckets:
            if bucket.moves:
                moved += self.wire.itemsize * self._exchanged(bucket)
        buffers, padded = self._buffers()
        if self.replicas > 1:
            moved += (self.replicas - 1) * self.wire.itemsize * padded
        temporary += buffers
        counts = Counts(momentum, state, moved, calls, flops, temporary)
        if self.blocks is None:
            return counts
        of_blocks = self.blocks.count()
        of_blocks.momentum = momentum
        of_blocks.temporary_bytes = of_blocks.temporary_bytes.maximum(temporary)
        return of_blocks

    def whole(self, layout: Layout) -> Probe:
        """Return what a matrix takes at its owner; probed once for each shape."""
        shape = layout.matrix.read_shape
        if shape not in self._probes:
            arguments = (self.rule, self.options, shape, self.wire, self.state_dtype)
            self._probes[shape] = probe_whole(*arguments)
        return self._probes[shape]

    def slab(self, layout: Layout, is_owner: bool) -> tuple[Probe, int]:
        """Return what the largest slab of a matrix takes, and the rank that has it."""
        matrix, cut = layout.matrix, slabs(layout, self.ranks)
        lengths = slab_lengths(cut)
        rank = int(lengths.argmax())
        key = (matrix.shape, matrix.transposed, cut.along, int(lengths[rank]), is_owner)
        if key not in self._probes:
            self._probes[key] = probe_slab(
                self.rule, self.options, matrix.shape, matrix.transposed, cut, self.ranks, rank,
                is_owner, self.wire, self.state_dtype,
            )  # fmt: skip
        return self._probes[key], rank

    def _state_bytes(self, shape: Shape) -> int:
        """Return the bytes of a whole matrix's state at its owner."""
        specs = self.rule.state(self.options, shape).values()
        return sum(math.prod(s.shape) * (s.dtype or self.state_dtype).itemsize for s in specs)

    def _count_in_slabs(
        self, layout: Layout, replica: int, owner: int, state: Tensor, calls: Tensor,
        flops: Tensor, moved: Tensor,
    ) -> None:  # fmt: skip
        """Add what a matrix in slabs takes on each rank of its replica."""
        matrix = layout.matrix
        lengths = slab_lengths(slabs(layout, self.ranks))
        along = slabs(layout, self.ranks).along ^ int(matrix.transposed)
        for spec in self.rule.state(self.options, matrix.read_shape).values():
            size = math.prod(spec.shape) * (spec.dtype or self.state_dtype).itemsize
            dimension = spec.cut_dimension(along)
            if spec.where == "owner":
                state[replica, owner] += size
            elif dimension is None:
                state[replica] += size
            else:
                state[replica] += size // spec.shape[dimension] * lengths
        (other, rank), (at_owner, _) = (self.slab(layout, owns) for owns in (False, True))
        flops[replica] += other.flops * lengths // lengths[rank]
        flops[replica, owner] += at_owner.flops - other.flops
        moved[replica] += other.sent_bytes
        moved[replica, owner] += at_owner.sent_bytes - other.sent_bytes
        calls[replica, owner] += at_owner.polar_calls

    def _exchanged(self, bucket: Bucket) -> Tensor:
        """Return the elements that each rank sends to others for a bucket: shards, and back."""
        sent = self.zeros()
        for owner, matrices in bucket.matrices.items():
            replica, rank = divmod(owner, self.ranks)
            for i in matrices:
                layout = self.layouts[i]
                ranks, numels, own = shares(layout.storage())
                if bucket.gram:
                    cut = slabs(layout, self.ranks)
                    kept = kept_in_slabs(layout.storage(), cut)
                    sent[replica].index_add_(0, ranks, numels)
                    width = min(layout.matrix.shape)
                    sent[replica] += slab_lengths(cut) * width - 2 * kept
                    continue
                sent[replica].index_add_(0, ranks, numels)
                sent[replica, rank] += layout.matrix.numel - 2 * own.get(rank, 0)
        return sent

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Return temporary bytes of exchange and rule, and elements gathered from replicas.

        A bucket is exchanged while the one before is computed and the one before that returns, so
        three are there at once, and a fourth where shards have replicas.
        """
        sends, takes, returns, work, moving, padded = (self.zeros() for _ in range(6))
        for bucket in self.plan.buckets:
            matrices = [i for indices in bucket.matrices.values() for i in indices]
            runs = self.runs(matrices)
            owned, bucket_work = self._taken(bucket)
            sends, takes = torch.maximum(sends, runs), torch.maximum(takes, owned)
            work = torch.maximum(work, bucket_work)
            # in turn, two replicas' directions are there at once
            arrived = 2 * runs.amax(0) if bucket.in_turn else runs.sum(0)
            returns = torch.maximum(returns, arrived.expand_as(runs))
            moving = torch.maximum(moving, owned * bucket.moves)
            padded += runs if bucket.in_turn else runs.amax(0)
        wire, wide = self.wire.itemsize, self.state_dtype.itemsize
        widened = wide * (wire != wide)  # directions are also there in the state's dtype
        # gradients and weights are widened as well, if the parameters are narrower than state
        narrow = wide * (self.unit.dtype != self.state_dtype)
        is_tiled = not all(layout.stacked() for layout in self.layouts)
        youngest = (sends + moving) * wire + sends * narrow
        in_hand = (2 + is_tiled) * takes * wire + work
        oldest = (takes + moving) * wire + sends * (wire + widened + narrow)
        stages = [[youngest, in_hand, oldest]]
        if self.replicas > 1:
            spreading = (takes + 2 * sends + returns) * wire
            changing = (takes + sends + 2 * returns) * wire + returns * (wide + widened + narrow)
            stages = [[*stages[0], spreading], [youngest, oldest, spreading, changing]]
        total = self.zeros()
        for together in stages:  # a bucket begins its next one before the last has ended
            most = min(len(together), len(self.plan.buckets) + 1)
            total = total.maximum(torch.stack(together).topk(most, 0).values.sum(0))
        return total, padded

    def _taken(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Return the elements of the matrices or slabs that each rank computes, and work bytes."""
        taken, work = self.zeros(), self.zeros()
        if bucket.gram:
            for i in (i for indices in bucket.matrices.values() for i in indices):
                replica, owner = self.place(i)
                layout = self.layouts[i]
                lengths = slab_lengths(slabs(layout, self.ranks))
                taken[replica] += lengths * min(layout.matrix.shape)
                work[replica] += self.slab(layout, False)[0].work_bytes
                more = (
                    self.slab(layout, True)[0].work_bytes - self.slab(layout, False)[0].work_bytes
                )
                work[replica, owner] += max(0, more)
            return taken, work
        for owner, matrices in bucket.matrices.items():
            replica, rank = divmod(owner, self.ranks)
            batches: dict[Shape, int] = {}
            for i in matrices:
                layout = self.layouts[i]
                taken[replica, rank] += layout.matrix.numel
                shape = layout.matrix.read_shape
                batches[shape] = batches.get(shape, 0) + self.whole(layout).work_bytes
            work[replica, rank] = max(batches.values())
        return taken, work


@lru_cache(maxsize=4096)
def shares(storage: tuple[Tile, ...]) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Return the ranks that store a part of a matrix, their numbers of elements, and both by rank.

    Args:
        storage: ``Layout.storage()``.
    """
    numel_of: dict[int, int] = {}
    for tile in storage:
        for rank, begin, end in tile.parts():
            numel_of[rank] = numel_of.get(rank, 0) + end - begin
    return torch.tensor(list(numel_of)), torch.tensor(list(numel_of.values())), numel_of


@lru_cache(maxsize=1024)
def slab_lengths(cut: Slabs) -> Tensor:
    """Return the number of rows or columns of each rank's slab."""
    return torch.tensor([end - begin for begin, end in cut.ranges])


@lru_cache(maxsize=1024)
def kept_in_slabs(storage: tuple[Tile, ...], cut: Slabs) -> Tensor:
    """Return, by rank, the elements that it stores of a matrix and that are in its own slab."""
    ranges = torch.tensor(list(cut.ranges))
    kept = torch.zeros(len(ranges), dtype=torch.int64)
    for tile in storage:
        parts = torch.tensor(list(tile.parts())).reshape(-1, 3)
        if not len(parts):
            continue
        ranks, edges = parts[:, 0], parts[:, 1:]
        first, size = (tile.col, tile.cols) if cut.along else (tile.row, tile.rows)
        low, high = (ranges[ranks] - first).clamp(0, size).unbind(1)
        counted = _below(edges, tile, low, high, cut.along)
        kept.index_add_(0, ranks, counted[:, 1] - counted[:, 0])
    return kept


def _below(edges: Tensor, tile: Tile, low: Tensor, high: Tensor, along: int) -> Tensor:
    """Count the elements of a tile before each edge that are in a range of rows or columns.

    Args:
        edges: (n, 2) of row-major elements.
        tile: the tile.
        low, high: the range of each, (n,).
        along: 0 for rows, 1 for columns.
    """
    low, high = low[:, None], high[:, None]
    if not along:
        return edges.clamp(low * tile.cols, high.maximum(low) * tile.cols)
    rows, rest = edges // tile.cols, edges % tile.cols
    return rows * (high - low) + (rest - low).clamp(min=0).minimum(high - low)
