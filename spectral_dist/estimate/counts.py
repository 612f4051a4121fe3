"""What each rank keeps, sends and computes for one unit of matrices, from its layouts and plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.strategy import blocks_of, plan_of
from spectral_dist.core.teams import machine_of
from spectral_dist.estimate.engines import PlacedUnit
from spectral_dist.estimate.probe import Probe, probe_slab, probe_whole
from spectral_dist.estimate.slabs import (
    MemberCounts,
    Team,
    kept_in_slabs,
    member_counts,
    row_counts,
    shares,
    slab_lengths,
)
from spectral_dist.estimate.traffic import BucketTraffic
from spectral_dist.rules.base import Rule, Shape
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import Bucket, Plan

__all__ = ["Counts", "MatrixCounter", "kept_in_slabs", "shares", "slab_lengths"]

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
        given = options.machine is not None
        host_team = unit.host_team(machine_of(options).host_size) if given else None
        plan, wire = plan_of(rule, options, unit.located, unit.dtype, host_team=host_team)
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
    def teams(self) -> dict[int, Team]:
        """Return the team of each matrix that stays in slabs."""
        return {
            i: Team.of(bucket, self.layouts[i], owner, self.ranks, self.replicas)
            for bucket in self.plan.buckets
            if bucket.gram or bucket.team > 1
            for owner, matrices in bucket.matrices.items()
            for i in matrices
        }

    @cached_property
    def owned_runs(self) -> Tensor:
        """Return the elements of each rank's runs of the matrices that its replica owns."""
        return self.runs(range(len(self.layouts)))

    def runs(self, matrices: Sequence[int]) -> Tensor:
        """Return the elements of each rank's runs of those matrices that its replica owns."""
        runs = self.zeros()
        for i in matrices:
            replica, _ = self.place(i)
            if self.ranks == 1 and i in self.teams:  # of a team of replicas each has its slab
                team = self.teams[i]
                team.of_ranks(runs).add_(team.lengths * min(self.layouts[i].matrix.shape))
                continue
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
            if i in self.teams:
                self._count_in_slabs(i, state, calls, flops, moved)
                continue
            probe = self.whole(layout)
            state[replica, rank] += self._state_bytes(layout.matrix.read_shape)
            calls[replica, rank] += probe.polar_calls
            flops[replica, rank] += probe.flops
        temporary = self.zeros()
        for bucket in self.plan.buckets:
            if bucket.moves:
                moved += self.wire.itemsize * self._sent(bucket)
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

    def members(self, layout: Layout, team: Team) -> MemberCounts:
        """Return what each rank of the team of a matrix in slabs takes.

        Args:
            layout: of the matrix.
            team: in the plan, or any other.

        Raises:
            ValueError: the rule or its polar method needs whole matrices.
        """
        shape, cut, size = layout.matrix.shape, team.cut, len(team.ranks)
        transposed, lengths, rows = layout.matrix.transposed, team.lengths, min(shape)

        def probe(place: int, is_owner: bool) -> Probe:
            """Return what a member takes; probed once for members that take the same."""
            share = int(row_counts(rows, size)[place]) if team.is_split else 0
            kind = (shape, transposed, cut.along, size, team.is_split, int(lengths[place]), share)
            if (*kind, is_owner) not in self._probes:
                self._probes[*kind, is_owner] = probe_slab(
                    self.rule, self.options, shape, transposed, cut, size, team.members[place],
                    is_owner, self.wire, self.state_dtype,
                    team=team.members if team.is_split else None,
                )  # fmt: skip
            return self._probes[*kind, is_owner]

        return member_counts(team, shape, probe)

    def _state_bytes(self, shape: Shape) -> int:
        """Return the bytes of a whole matrix's state at its owner."""
        specs = self.rule.state(self.options, shape).values()
        return sum(math.prod(s.shape) * (s.dtype or self.state_dtype).itemsize for s in specs)

    def _count_in_slabs(
        self, matrix: int, state: Tensor, calls: Tensor, flops: Tensor, moved: Tensor
    ) -> None:
        """Add what a matrix in slabs takes on each rank of its team."""
        read, team = self.layouts[matrix].matrix, self.teams[matrix]
        along = team.cut.along ^ int(read.transposed)
        kept = team.of_ranks(state)
        for spec in self.rule.state(self.options, read.read_shape).values():
            size = math.prod(spec.shape) * (spec.dtype or self.state_dtype).itemsize
            dimension = spec.cut_dimension(along)
            if spec.where == "owner":
                kept[team.owner] += size
            elif dimension is None:
                kept += size
            else:
                kept += size // spec.shape[dimension] * team.lengths
        counts = self.members(self.layouts[matrix], team)
        team.of_ranks(flops).add_(counts.flops)
        team.of_ranks(moved).add_(counts.sent_bytes)
        team.of_ranks(calls).add_(counts.polar_calls)

    @cached_property
    def _traffic(self) -> BucketTraffic | None:
        """Return what counts exchanges that may go in two steps; None: all go at once."""
        if self.options.machine is None or self.ranks == 1:
            return None
        return BucketTraffic(self.unit, self.teams, machine_of(self.options))

    def in_two_steps(self, bucket: Bucket) -> bool:
        """Return whether a bucket is exchanged within hosts first, as ``machine`` lets it."""
        if self._traffic is None or not bucket.moves:
            return False
        traffic = self._traffic.collected(bucket)
        return traffic.is_faster_in_two(self.wire.itemsize, self._traffic.machine)

    def _sent(self, bucket: Bucket) -> Tensor:
        """Return the elements that each rank sends to others for a bucket: shards, and back."""
        if self._traffic is not None and self.in_two_steps(bucket):
            within, between = self._traffic.collected(bucket).sent(in_two=True)
            return (within + between).round().long()
        sent = self.zeros()
        for owner, matrices in bucket.matrices.items():
            replica, rank = divmod(owner, self.ranks)
            for i in matrices:
                layout = self.layouts[i]
                ranks, numels, own = shares(layout.storage())
                sent[replica].index_add_(0, ranks, numels)
                team = self.teams.get(i)
                if team is not None:
                    kept = kept_in_slabs(layout.storage(), team.cut, team.members)
                    width = min(layout.matrix.shape)
                    team.of_ranks(sent).add_(team.lengths * width - 2 * kept)
                    continue
                sent[replica, rank] += layout.matrix.numel - 2 * own.get(rank, 0)
        return sent

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Return temporary bytes of exchange and rule, and elements gathered from replicas.

        A bucket is exchanged while the one before is computed and the one before that returns, so
        three are there at once, a fourth where shards have replicas, and two more where exchanges
        go in two steps.
        """
        sends, takes, returns, work, moving, padded = (self.zeros() for _ in range(6))
        there, back = self.zeros(), self.zeros()  # through this rank, in the first of two steps
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
            if self._traffic is not None and self.in_two_steps(bucket):
                through = self._traffic.collected(bucket).through.round().long()
                there, back = torch.maximum(there, through[0]), torch.maximum(back, through[1])
        wire, wide = self.wire.itemsize, self.state_dtype.itemsize
        widened = wide * (wire != wide)  # directions are also there in the state's dtype
        # gradients and weights are widened as well, if the parameters are narrower than state
        narrow = wide * (self.unit.dtype != self.state_dtype)
        is_tiled = not all(layout.stacked() for layout in self.layouts)
        youngest = [(sends + moving) * wire + sends * narrow]
        in_hand = (2 + is_tiled) * takes * wire + work
        oldest = [(takes + moving) * wire + sends * (wire + widened + narrow)]
        if bool(there.any()):
            youngest = [(2 * sends + there) * wire + sends * narrow, (2 * there + takes) * wire]
            in_hand = in_hand.maximum((2 * takes + back) * wire)
            oldest = [(2 * back + sends) * wire, back * wire + sends * (wire + widened + narrow)]
        stages = [[*youngest, in_hand, *oldest]]
        if self.replicas > 1:
            spreading = (takes + 2 * sends + returns) * wire
            changing = (takes + sends + 2 * returns) * wire + returns * (wide + widened + narrow)
            stages = [[*stages[0], spreading], [*youngest, *oldest, spreading, changing]]
        total = self.zeros()
        for together in stages:  # a bucket begins its next one before the last has ended
            most = min(len(together), len(self.plan.buckets) + 1)
            total = total.maximum(torch.stack(together).topk(most, 0).values.sum(0))
        return total, padded

    def _taken(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Return the elements of the matrices or slabs that each rank computes, and work bytes.

        Batches are computed one after the other.
        """
        taken, work = self.zeros(), self.zeros()
        for owner, matrices in bucket.matrices.items():
            replica, rank = divmod(owner, self.ranks)
            batches: dict[Shape, int] = {}
            for i in matrices:
                layout = self.layouts[i]
                if i in self.teams:
                    continue
                taken[replica, rank] += layout.matrix.numel
                shape = layout.matrix.read_shape
                batches[shape] = batches.get(shape, 0) + self.whole(layout).work_bytes
            work[replica, rank] = max(batches.values(), default=0)
        in_slabs: dict[Any, Tensor] = {}
        for i in (i for matrices in bucket.matrices.values() for i in matrices if i in self.teams):
            layout, team = self.layouts[i], self.teams[i]
            team.of_ranks(taken).add_(team.lengths * min(layout.matrix.shape))
            key = (layout.matrix.shape, layout.matrix.transposed, team.cut, team.ranks)
            of_member = self.members(layout, team).work_bytes
            in_slabs[key] = in_slabs[key] + of_member if key in in_slabs else of_member
        for (*_, ranks), of_batch in in_slabs.items():
            of_ranks = work.view(-1)[ranks.start : ranks.stop]
            of_ranks.copy_(of_ranks.maximum(of_batch))
        return taken, work
