"""Shards -> whole matrices at their owners -> shards -> the shards' replicas, a bucket at a time.

Every move is the same four C++ calls: split flat tensors into pieces, put the pieces in the order
of who needs them, concatenate, one collective. All orders are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor

from spectral_dist.machine import Machine
from spectral_dist.polar.batching import CPU_BATCH
from spectral_dist.sharding import collectives
from spectral_dist.sharding.bucket_routes import Batch, BucketRoute, Piece, pack, route_to_owners
from spectral_dist.sharding.collectives import Group, Meter, Pending
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.groups import host_groups, team_of
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.matrix import Matrix
from spectral_dist.sharding.plan import Bucket, Plan, first_of
from spectral_dist.sharding.slabs import route_in_replicas, route_to_slabs
from spectral_dist.sharding.split import SplitReduction
from spectral_dist.sharding.two_steps import TwoSteps, faster_in_two

__all__ = ["Exchange", "MatrixTask", "Piece", "Pieces"]


class MatrixTask(ABC):
    """What an exchange calls on matrices and runs; ``core.matrix_step.MatrixStep`` is one."""

    @abstractmethod
    def update_input(self, pieces: list[Piece]) -> list[Tensor]:
        """Return, for each of these pieces of this rank, the elements to orthogonalize."""

    @abstractmethod
    def direction(self, matrices: Tensor, which: Sequence[int]) -> Tensor:
        """Return the directions of a batch of whole matrices (k, m, n), in the wire's dtype."""

    @abstractmethod
    def slab_direction(self, slabs: Tensor, reduction: Reduction) -> Tensor:
        """Return this rank's slabs of directions; a collective call of the group.

        Args:
            slabs: (k, rows, columns), this rank's slab of each matrix of a batch.
            reduction: computes whole-matrix quantities of them.
        """

    @abstractmethod
    def apply(self, pieces: list[Piece], directions: list[Tensor]) -> None:
        """Update the weights of these pieces of this rank by their directions."""


class Pieces:
    """A set of pieces of local tensors, sorted by tensor and position, that makes views of them.

    Attributes:
        pieces: each once.
        numel: the number of their elements in each local tensor that has any.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = sorted(set(pieces), key=lambda piece: (piece.tensor, piece.start))
        self.numel: dict[int, int] = {}
        self._splits: dict[int, list[int]] = {}  # lengths: gap, piece, gap, piece, ...
        self._by_tensor: dict[int, list[Piece]] = {}
        ends: dict[int, int] = {}
        for piece in self.pieces:
            self._splits.setdefault(piece.tensor, []).extend(
                (piece.start - ends.get(piece.tensor, 0), piece.length)
            )
            ends[piece.tensor] = max(piece.end, ends.get(piece.tensor, 0))
            self._by_tensor.setdefault(piece.tensor, []).append(piece)
            self.numel[piece.tensor] = self.numel.get(piece.tensor, 0) + piece.length
        # tensors of which the pieces leave out nothing are packed as they are
        self._is_whole = {index: numel == ends[index] for index, numel in self.numel.items()}
        self._has_rectangles = {
            index for index, pieces in self._by_tensor.items() if not all(p.is_run for p in pieces)
        }

    def views(self, tensors: Sequence[Tensor]) -> dict[Piece, Tensor]:
        """Return a view of every piece, given all local tensors."""
        views: list[Tensor] = []
        for index, sizes in self._splits.items():
            tensor = tensors[index]
            flat = (tensor.detach() if tensor.requires_grad else tensor).view(-1)
            if index in self._has_rectangles:
                views += [piece.view(flat) for piece in self._by_tensor[index]]
                continue
            rest = flat.numel() - sum(sizes)
            if len(sizes) == 2 and not sizes[0] and not rest:  # one run that is all of the tensor
                views.append(flat)
            else:
                views += torch.split(flat, [*sizes, rest])[1::2]
        return dict(zip(self.pieces, views, strict=True))

    def packed_views(self, index: int, packed: Tensor) -> dict[Piece, Tensor]:
        """Return a view of every piece of local tensor ``index``, out of a packed tensor.

        Args:
            index: of the local tensor.
            packed: its pieces and nothing else, as ``pack`` makes it.
        """
        pieces, flat = self._by_tensor.get(index, []), packed.detach().view(-1)
        if index in self._has_rectangles and self._is_whole[index]:
            return {piece: piece.view(flat) for piece in pieces}
        runs = torch.split(flat, [piece.length for piece in pieces]) if pieces else ()
        return {piece: piece.shaped(run) for piece, run in zip(pieces, runs, strict=True)}

    def pack(self, index: int, tensor: Tensor) -> Tensor:
        """Return the pieces of local tensor ``index``, flat, as a copy.

        They come one after the other, or in the tensor's own order if they are all of it.
        """
        pieces, flat = self._by_tensor.get(index, []), tensor.reshape(-1)
        if index in self._has_rectangles and self._is_whole[index]:
            return flat[: self.numel[index]].clone()
        views = [piece.view(flat).reshape(-1) for piece in pieces]
        return torch.cat(views) if views else tensor.new_empty(0)


class Exchange:
    """Moves the shards of one list of layouts to owners and back, along a plan.

    Args:
        layouts: where each matrix lives; equal on all ranks, which is checked once, on building.
        plan: the owners and buckets; checked in the same way.
        group: the ranks that share the matrices; None: only this process.
        device: where matrices are computed and collectives run.
        like: a tensor with the dtype and device in which directions are wanted back.
        wire_dtype: of the elements sent; also rounded to when nothing is sent, so that the
            numbers do not depend on the layout.
        meter: counts calls and bytes.
        replicas: the ranks that store the same shards as this one.
        rounds_alike: on a CPU, whether so many matrices like this one may be computed in one call,
            because that changes no bit; None: never. On other devices they are.
        machine: by which to choose exchanges in two steps; None: all are made at once.

    Attributes:
        state_device, state_dtype: of ``like``.
        num_replicas: the number of replicas.
        routes: what this rank sends and receives for each bucket.
        local_runs: this rank's runs of all matrices.
        owned_runs: this rank's runs of the matrices that its replica owns.

    Raises:
        RuntimeError: on every rank, if their layouts, plans or wire dtypes differ.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        plan: Plan,
        *,
        group: Group,
        device: torch.device,
        like: Tensor,
        wire_dtype: torch.dtype,
        meter: Meter,
        replicas: Group = None,
        rounds_alike: Callable[[Matrix, int], bool] | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.state_device, self.state_dtype = like.device, like.dtype
        self.group, self.replicas, self.device = group, replicas, device
        self.wire_dtype, self.meter = wire_dtype, meter
        rank, ranks = collectives.rank(group), collectives.size(group)
        replica, self.num_replicas = collectives.rank(replicas), collectives.size(replicas)
        groups = (group, replicas)
        collectives.assert_same([layout.describe() for layout in layouts], groups, device)
        planned = zip(layouts, plan.owners, plan.strategies, strict=True)
        lines = [f"{x.matrix.name} {strategy} owner {owner}" for x, owner, strategy in planned]
        lines += [f"bucket {bucket}" for bucket in plan.buckets] + [f"wire {wire_dtype}"]
        collectives.assert_same(lines, groups, device)
        # on CPUs the rounding of a product depends on the operands' alignment, and on the other
        # matrices of its batch: each batch gets memory of its own there
        self._is_on_cpu = device.type == "cpu"

        def divide(batch: Batch) -> list[Batch]:
            """Divide matrices of one shape into those that are computed in one call."""
            if not self._is_on_cpu:
                return [batch]
            if rounds_alike is None:
                return batch.chunks(1)
            matrix, chunks = layouts[batch.matrices[0]].matrix, batch.chunks(CPU_BATCH)
            sizes = {len(chunk.matrices) for chunk in chunks}
            alike = {size: size == 1 or rounds_alike(matrix, size) for size in sizes}
            return [
                part
                for chunk in chunks
                for part in ([chunk] if alike[len(chunk.matrices)] else chunk.chunks(1))
            ]

        sharing = group if ranks > 1 else replicas
        teams = {size: team_of(sharing, size) for size in _team_sizes(plan)}
        self.routes: list[BucketRoute] = []
        self._reductions: dict[tuple[int, ...], Reduction] = {}
        for bucket in plan.buckets:
            arguments = (bucket, layouts, rank, ranks, replica, self.num_replicas)
            if not bucket.gram and bucket.team == 1:
                self.routes.append(route_to_owners(*arguments, divide))
                continue
            if bucket.team > 1 and ranks == 1:
                route, batches = route_in_replicas(bucket, layouts, replica, self.num_replicas)
            else:
                route, batches = route_to_slabs(*arguments)
            self.routes.append(route)
            for batch in batches:
                if batch.team is None:
                    self._reductions[batch.matrices] = Reduction(batch, group, meter)
                    continue
                self._reductions[batch.matrices] = SplitReduction(batch, teams[bucket.team], meter)
        for bucket, route in zip(plan.buckets, self.routes, strict=True):
            if bucket.in_turn:
                route.senders = _senders(bucket, ranks)
        if machine is not None and ranks > 1:
            self._send_in_two_steps(machine)
        self.local_runs = Pieces([piece for route in self.routes for piece in route.result_runs])
        self.owned_runs = Pieces([piece for route in self.routes for piece in route.send_runs])

    def _send_in_two_steps(self, machine: Machine) -> None:
        """Let buckets travel within hosts first, where that is predicted to be faster.

        A collective call. Without several equal hosts nothing changes.
        """
        moving = [route for route in self.routes if route.moves]
        counts = [(route.send_counts, route.recv_counts) for route in moving]
        grid, are_faster = faster_in_two(
            counts, (self.group, self.replicas), self.wire_dtype.itemsize, self.device, machine
        )
        if not any(are_faster):
            return
        assert self.group is not None
        assert grid is not None
        groups = host_groups(self.group, grid)
        for route, (sent, received), is_faster in zip(moving, counts, are_faster, strict=True):
            if is_faster:
                route.two_steps = (
                    TwoSteps(groups, sent, received, self.device),
                    TwoSteps(groups, received, sent, self.device),
                )

    def batches(self) -> Iterator[tuple[tuple[int, ...], Reduction | None]]:
        """Yield each batch that this rank computes: its matrices' indices, and its reduction.

        The reduction is None if the batch's matrices are whole here.
        """
        for route in self.routes:
            for which in route.batches:
                yield which, self._reductions.get(which)

    def run(self, task: MatrixTask) -> None:
        """Send every matrix to its owner and its direction back, bucket by bucket.

        A bucket pauses whenever it has something in flight, and the younger ones go first; so the
        next bucket's exchange is in flight while this one is computed, and this one's return while
        the next is. Three buckets are in memory, four where shards have replicas.

        Args:
            task: what is done to runs and matrices.
        """
        waiting = [self._run_bucket(route, task) for route in self.routes][::-1]
        running: list[Iterator[None]] = []  # the youngest first
        while waiting or running:
            if waiting:
                running.insert(0, waiting.pop())
            # advance each by one stage; ``next`` returns its default, the bucket itself, at the end
            running = [bucket for bucket in running if next(bucket, bucket) is not bucket]

    def _run_bucket(self, route: BucketRoute, task: MatrixTask) -> Iterator[None]:
        """Run one bucket from shards to owners and back, and yield after beginning a collective."""
        received = yield from self._move(route, self._packed_inputs(route, task))
        directions = self._compute(route, task, route.packing.unpack_matrices(received))
        del received
        packed = route.packing.pack_directions(directions, self.wire_dtype, self.device)
        del directions
        returned = yield from self._move(route, packed, back=True)
        del packed
        flat = route.packing.unpack_directions(returned)
        del returned
        if route.senders:
            yield from self._apply_in_turn(route, flat, task)
            return
        if self.num_replicas > 1:
            exchanging = self._exchange_replicas(route, flat)
            yield
            parts = exchanging.wait().view(self.num_replicas, max(route.counts_per_replica))
            flat = torch.cat([p[:n] for p, n in zip(parts, route.counts_per_replica, strict=True)])
        task.apply(route.result_runs, self._directions(flat, route.result_runs))

    def _packed_inputs(self, route: BucketRoute, task: MatrixTask) -> Tensor:
        """Return a bucket's shards, in the order in which they are sent."""
        inputs = task.update_input(route.send_runs) if route.send_runs else []
        return route.packing.pack_to_send(pack(inputs, self.wire_dtype, self.device))

    def _move(
        self, route: BucketRoute, packed: Tensor, back: bool = False
    ) -> Generator[None, None, Tensor]:
        """Send shards to the owners of their matrices, or to slabs; yield whenever one waits.

        Args:
            route: of the bucket.
            packed: what is sent, ordered by receiving rank.
            back: whether directions return to shards.

        Returns:
            What is received, ordered by sending rank.
        """
        if not route.moves:
            yield
            return packed
        if route.two_steps is None:
            sent, received = (route.send_counts, route.recv_counts)[:: -1 if back else 1]
            pending = collectives.all_to_all(packed, sent, received, self.group, self.meter)
            del packed
        else:
            steps = route.two_steps[back]
            first = steps.begin(packed, self.meter)
            del packed
            yield
            pending = steps.go_on(first, self.meter)
        yield
        return pending.wait()

    def _compute(self, route: BucketRoute, task: MatrixTask, batches: list[Tensor]) -> list[Tensor]:
        """Return the directions of each batch, (k, rows, columns)."""
        directions = []
        for x, which in zip(batches, route.batches, strict=True):
            reduction = self._reductions.get(which)
            if reduction:
                directions.append(task.slab_direction(x, reduction))
            else:
                directions.append(task.direction(x.clone() if self._is_on_cpu else x, which))
        return directions

    def _apply_in_turn(self, route: BucketRoute, flat: Tensor, task: MatrixTask) -> Iterator[None]:
        """Send the directions of one replica after the other, and apply those that have arrived."""
        replica = collectives.rank(self.replicas)
        sent: tuple[list[Piece], Pending] | None = None
        for k in route.senders:
            values = flat if k == replica else flat.new_empty(route.counts_per_replica[k])
            sending = collectives.broadcast(values, k, self.replicas, self.meter)
            yield
            if sent is not None:
                task.apply(sent[0], self._directions(sent[1].wait(), sent[0]))
            sent = route.runs_of_replicas[k], sending
        if sent is not None:
            task.apply(sent[0], self._directions(sent[1].wait(), sent[0]))

    def _exchange_replicas(self, route: BucketRoute, flat: Tensor) -> Pending:
        """Begin gathering the directions of all replicas' matrices, padded to equal length."""
        padding = flat.new_zeros(max(route.counts_per_replica) - flat.numel())
        return collectives.all_gather(torch.cat([flat, padding]), self.replicas, self.meter)

    def _directions(self, flat: Tensor, pieces: list[Piece]) -> list[Tensor]:
        """Split flat directions into those of each piece, in the states' dtype and device."""
        state = flat.to(device=self.state_device, dtype=self.state_dtype)
        runs = torch.split(state, [piece.length for piece in pieces])
        return [piece.shaped(run) for piece, run in zip(pieces, runs, strict=True)]


def _team_sizes(plan: Plan) -> list[int]:
    """Return the sizes of the teams that a plan has, the largest first."""
    return sorted({bucket.team for bucket in plan.buckets} - {1}, reverse=True)


def _senders(bucket: Bucket, ranks: int) -> list[int]:
    """Return the replicas that compute directions of a bucket, ascending; ``ranks``: of each."""
    firsts = {first_of(owner, ranks, bucket.team) // ranks for owner in bucket.matrices}
    shared = bucket.team if ranks == 1 else 1
    return sorted({first + k for first in firsts for k in range(shared)})
