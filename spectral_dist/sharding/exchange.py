"""Shards -> whole matrices at their owners -> shards -> the shards' replicas, a bucket at a time.

Every move is the same four C++ calls: split flat tensors into pieces, put the pieces in the order
of who needs them, concatenate, one collective. All orders are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectral_dist.sharding import collectives
from spectral_dist.sharding.bucket_routes import BucketRoute, Piece, pack, route_to_owners
from spectral_dist.sharding.collectives import Group, Meter, Pending
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import Plan
from spectral_dist.sharding.slabs import route_to_slabs

__all__ = ["Exchange", "MatrixTask", "Piece", "Pieces"]


class MatrixTask(ABC):
    """What is done to the matrices on their way; see ``core.matrix_step.MatrixStep``."""

    @abstractmethod
    def update_input(self, pieces: list[Piece]) -> list[Tensor]:
        """Return what must be orthogonalized of these runs of this rank."""

    @abstractmethod
    def direction(self, matrices: Tensor, which: Sequence[int]) -> Tensor:
        """Return the directions of a batch of whole matrices (k, m, n), in the wire's dtype."""

    @abstractmethod
    def slab_direction(self, slabs: Tensor, reduction: Reduction) -> Tensor:
        """Return the slabs of directions of matrices of which this rank has a slab each.

        A call of all the group.
        """

    @abstractmethod
    def apply(self, pieces: list[Piece], directions: list[Tensor]) -> None:
        """Take the directions of these runs of this rank."""


class Pieces:
    """Some runs of local tensors, in their order; gives views of them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = sorted(set(pieces), key=lambda piece: (piece.tensor, piece.start))
        self.numel: dict[int, int] = {}
        """elements of them in each local tensor"""
        self._splits: dict[int, list[int]] = {}  # not ours, piece, not ours, piece, ...
        self._by_tensor: dict[int, list[Piece]] = {}
        ends: dict[int, int] = {}
        for piece in self.pieces:
            self._splits.setdefault(piece.tensor, []).extend(
                (piece.start - ends.get(piece.tensor, 0), piece.length)
            )
            ends[piece.tensor] = piece.start + piece.length
            self._by_tensor.setdefault(piece.tensor, []).append(piece)
            self.numel[piece.tensor] = self.numel.get(piece.tensor, 0) + piece.length

    def views(self, tensors: Sequence[Tensor]) -> dict[Piece, Tensor]:
        """Flat views of every piece of the local tensors."""
        views: list[Tensor] = []
        for index, sizes in self._splits.items():
            flat = tensors[index].detach().view(-1)
            views += torch.split(flat, [*sizes, flat.numel() - sum(sizes)])[1::2]
        return dict(zip(self.pieces, views, strict=True))

    def packed_views(self, index: int, packed: Tensor) -> dict[Piece, Tensor]:
        """Flat views of tensor ``index``'s pieces, of one that holds nothing but them."""
        pieces = self._by_tensor.get(index, [])
        views = torch.split(packed.detach().view(-1), [piece.length for piece in pieces])
        return dict(zip(pieces, views, strict=True)) if pieces else {}

    def pack(self, index: int, tensor: Tensor) -> Tensor:
        """The pieces of the local tensor ``index`` one after the other, flat."""
        views = [tensor.reshape(-1)[p.start :][: p.length] for p in self._by_tensor.get(index, [])]
        return torch.cat(views) if views else tensor.new_empty(0)


class Exchange:
    """Moves the shards of one list of layouts to owners and back, along a plan.

    Args:
        layouts: where each matrix lives; equal on all ranks, which is checked here, once.
        plan: who owns what, and in which bucket.
        group: the ranks that share the matrices; None for this process alone.
        replicas: the ranks that store the same shards as this one.
        device: where matrices are computed and collectives run.
        like: a tensor with the dtype and device in which directions are wanted back.
        wire_dtype: of the elements sent; also rounded to when nothing is sent, so that the
            numbers do not depend on the layout.
        meter: counts calls and bytes.
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
    ) -> None:
        self.state_device, self.state_dtype = like.device, like.dtype
        self.group, self.replicas, self.device = group, replicas, device
        self.wire_dtype, self.meter = wire_dtype, meter
        rank, ranks = collectives.rank(group), collectives.size(group)
        replica, self.num_replicas = collectives.rank(replicas), collectives.size(replicas)
        groups = (group, replicas)
        collectives.assert_same([layout.describe() for layout in layouts], groups, device)
        where = zip(layouts, plan.owners, plan.strategies, strict=True)
        lines = [f"{x.matrix.name} {strategy} owner {owner}" for x, owner, strategy in where]
        lines += [f"bucket {bucket}" for bucket in plan.buckets] + [f"wire {wire_dtype}"]
        collectives.assert_same(lines, groups, device)
        # a product on CPUs rounds by its operands' alignment, and by what it is batched with
        self._one_by_one = device.type == "cpu"
        self.routes: list[BucketRoute] = []
        self._reductions: dict[tuple[int, ...], Reduction] = {}
        for bucket in plan.buckets:
            here = (bucket, layouts, rank, ranks, replica, self.num_replicas)
            if not bucket.gram:
                self.routes.append(route_to_owners(*here, not self._one_by_one))
                continue
            route, batches = route_to_slabs(*here)
            self.routes.append(route)
            for batch in batches:
                self._reductions[batch.matrices] = Reduction(batch, group, meter)
        self.local_runs = Pieces([piece for route in self.routes for piece in route.result_runs])
        """this rank's runs of all matrices"""
        self.owned_runs = Pieces([piece for route in self.routes for piece in route.send_runs])
        """this rank's runs of the matrices that its replica owns"""

    def batches(self) -> Iterator[tuple[tuple[int, ...], Reduction | None]]:
        """The matrices that this rank computes together, and how, if it has slabs of them."""
        for route in self.routes:
            for which in route.batches:
                yield which, self._reductions.get(which)

    def run(self, task: MatrixTask) -> None:
        """Take every matrix to its owner and its direction back, bucket by bucket.

        A bucket pauses whenever it has something in flight, and the younger ones go first; so the
        next bucket's exchange is in flight while this one is computed, and this one's return while
        the next is. Three buckets are in memory, four where shards have replicas.
        """
        waiting = [self._run_bucket(route, task) for route in self.routes][::-1]
        under_way: list[Iterator[None]] = []
        while waiting or under_way:
            if waiting:
                under_way.insert(0, waiting.pop())
            under_way = [way for way in under_way if next(way, way) is not way]  # way: it ended

    def _run_bucket(self, route: BucketRoute, task: MatrixTask) -> Iterator[None]:
        """One bucket's way from shards to owners and back, with a pause at each collective."""
        collecting = self._collect(route, task)
        yield
        directions = self._compute(route, task, route.packing.unpack_matrices(collecting.wait()))
        returning = self._deliver(route, directions)
        del directions
        yield
        flat = route.packing.unpack_directions(returning.wait())
        if self.num_replicas > 1:
            spreading = self._exchange_replicas(route, flat)
            yield
            parts = spreading.wait().view(self.num_replicas, max(route.counts_per_replica))
            flat = torch.cat([p[:n] for p, n in zip(parts, route.counts_per_replica, strict=True)])
        task.apply(route.result_runs, self._directions(flat, route.result_runs))

    def _collect(self, route: BucketRoute, task: MatrixTask) -> Pending:
        """Begin bringing a bucket's matrices to their owners, or slabs to their ranks."""
        inputs = task.update_input(route.send_runs) if route.send_runs else []
        packed = pack(inputs, self.wire_dtype, self.device)
        sent = route.packing.pack_to_send(packed)
        if not route.moves:
            return Pending(sent)
        return collectives.all_to_all(
            sent, route.send_counts, route.recv_counts, self.group, self.meter
        )

    def _compute(self, route: BucketRoute, task: MatrixTask, batches: list[Tensor]) -> list[Tensor]:
        """Return the directions of each batch."""
        directions = []
        for x, which in zip(batches, route.batches, strict=True):
            reduction = self._reductions.get(which)
            if reduction:
                directions.append(task.slab_direction(x, reduction))
            else:
                directions.append(task.direction(x.clone() if self._one_by_one else x, which))
        return directions

    def _deliver(self, route: BucketRoute, directions: list[Tensor]) -> Pending:
        """Begin returning the batches' directions to the shards of this replica."""
        flat = route.packing.pack_directions(directions, self.wire_dtype, self.device)
        if not route.moves:
            return Pending(flat)
        return collectives.all_to_all(
            flat, route.recv_counts, route.send_counts, self.group, self.meter
        )

    def _exchange_replicas(self, route: BucketRoute, flat: Tensor) -> Pending:
        """Begin exchanging what each replica was given for its own matrices."""
        padding = flat.new_zeros(max(route.counts_per_replica) - flat.numel())
        return collectives.all_gather(torch.cat([flat, padding]), self.replicas, self.meter)

    def _directions(self, flat: Tensor, pieces: list[Piece]) -> list[Tensor]:
        """The directions of ``pieces``, run by run, where states are."""
        state = flat.to(device=self.state_device, dtype=self.state_dtype)
        return list(torch.split(state, [piece.length for piece in pieces]))
