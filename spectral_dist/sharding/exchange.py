"""Shards -> whole matrices at their owners -> shards -> the shards' replicas, a bucket at a time.

Every move is the same four C++ calls: split flat tensors into pieces, put the pieces in the order
of who needs them, concatenate, one collective. All orders are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter, Pending
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import Plan
from spectral_dist.sharding.routes import Piece, Route, pack, route_to_owners
from spectral_dist.sharding.slabs import route_to_slabs

__all__ = ["Exchange", "Piece", "Pieces", "Work"]


class Work(Protocol):
    """What is done to the matrices on their way; see ``optimizer.MatrixStep``."""

    absorbs: bool
    """whether ``absorb`` is to be called"""
    numbers: bool
    """whether ``direction`` gives a number for each matrix as well"""

    def request(self, pieces: list[Piece]) -> list[Tensor]:
        """What must be orthogonalized of these runs of this rank."""

    def direction(self, matrices: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Of a batch of whole matrices (k, m, n) in the wire's dtype; the numbers (k,) float32."""

    def slabs(self, slabs: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor | None]:
        """``direction`` of matrices of which this rank has a slab each; a call of all the group.

        The directions of the slabs, and the numbers of the matrices.
        """

    def absorb(
        self, pieces: list[Piece], directions: list[Tensor], numbers: list[Tensor]
    ) -> list[Tensor]:
        """The directions after the owner's replica has put them in its momentum."""

    def settle(self, pieces: list[Piece], directions: list[Tensor], numbers: list[Tensor]) -> None:
        """What to do with the directions of these runs of this rank."""


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
        home: a tensor with the dtype and device in which directions are wanted back.
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
        home: Tensor,
        wire_dtype: torch.dtype,
        meter: Meter,
        replicas: Group = None,
    ) -> None:
        self.home_device, self.home_dtype = home.device, home.dtype
        self.group, self.replicas, self.device = group, replicas, device
        self.wire_dtype, self.meter = wire_dtype, meter
        rank, ranks = collectives.rank(group), collectives.size(group)
        replica, self.copies = collectives.rank(replicas), collectives.size(replicas)
        groups = (group, replicas)
        collectives.assert_same([layout.describe() for layout in layouts], groups, device)
        where = zip(layouts, plan.owners, plan.strategies, strict=True)
        lines = [f"{x.matrix.name} {strategy} owner {owner}" for x, owner, strategy in where]
        lines += [f"bucket {bucket}" for bucket in plan.buckets] + [f"wire {wire_dtype}"]
        collectives.assert_same(lines, groups, device)
        # a product on CPUs rounds by its operands' alignment, and by what it is batched with
        self._alone = device.type == "cpu"
        self.routes: list[Route] = []
        self._reductions: dict[tuple[int, ...], Reduction] = {}
        for bucket in plan.buckets:
            here = (bucket, layouts, rank, ranks, replica, self.copies)
            if not bucket.gram:
                self.routes.append(route_to_owners(*here, not self._alone))
                continue
            route, batches = route_to_slabs(*here)
            self.routes.append(route)
            for batch in batches:
                self._reductions[batch.matrices] = Reduction(batch, group, meter)
        self.stored = Pieces([piece for route in self.routes for piece in route.returns])
        """this rank's runs of all matrices"""
        self.given = Pieces([piece for route in self.routes for piece in route.gives])
        """this rank's runs of the matrices that its replica owns"""

    def batches(self) -> Iterator[tuple[tuple[int, ...], Reduction | None]]:
        """The matrices that this rank computes together, and how, if it has slabs of them."""
        for route in self.routes:
            for which in route.batches:
                yield which, self._reductions.get(which)

    def run(self, work: Work) -> None:
        """Take every matrix to its owner and its direction back, bucket by bucket.

        A bucket pauses whenever it has something in flight, and the younger ones go first; so the
        next bucket's exchange is in flight while this one is computed, and this one's return while
        the next is. Three buckets are in memory, four where shards have replicas.
        """
        waiting = [self._way(route, work) for route in self.routes][::-1]
        under_way: list[Iterator[None]] = []
        while waiting or under_way:
            if waiting:
                under_way.insert(0, waiting.pop())
            under_way = [way for way in under_way if next(way, way) is not way]  # way: it ended

    def _way(self, route: Route, work: Work) -> Iterator[None]:
        """One bucket's way from shards to owners and back, with a pause at each collective."""
        collecting = self._collect(route, work)
        yield
        found = self._compute(route, work, route.parcels.land(collecting.wait()))
        numbers: dict[int, Tensor] = {}
        if work.numbers:
            numbers = self._share(route, [n for _, n in found if n is not None])
        returning = self._deliver(route, [direction for direction, _ in found])
        del found
        yield
        flat = route.parcels.keep(returning.wait())
        if work.absorbs:
            directions = self._directions(flat, route.gives)
            mine = [numbers[piece.matrix] for piece in route.gives] if numbers else []
            # not rounded again: the momentum has seen the rounded direction already
            flat = pack(work.absorb(route.gives, directions, mine), self.home_dtype, self.device)
        if self.copies > 1:
            spreading = self._spread(route, flat)
            yield
            parts = spreading.wait().view(self.copies, max(route.given))
            flat = torch.cat([p[:n] for p, n in zip(parts, route.given, strict=True)])
        mine = [numbers[piece.matrix] for piece in route.returns] if numbers else []
        work.settle(route.returns, self._directions(flat, route.returns), mine)

    def _collect(self, route: Route, work: Work) -> Pending:
        """Begin bringing a bucket's matrices to their owners, or slabs to their ranks."""
        given = pack(work.request(route.gives) if route.gives else [], self.wire_dtype, self.device)
        sent = route.parcels.send(given)
        if not route.moves:
            return Pending(sent)
        return collectives.all_to_all(
            sent, route.gives_sizes, route.takes_sizes, self.group, self.meter
        )

    def _compute(
        self, route: Route, work: Work, batches: list[Tensor]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The directions of each batch, and its numbers if there are any."""
        found = []
        for x, which in zip(batches, route.batches, strict=True):
            reduction = self._reductions.get(which)
            if reduction:
                found.append(work.slabs(x, reduction))
            else:
                found.append(work.direction(x.clone() if self._alone else x, which))
        return found

    def _deliver(self, route: Route, directions: list[Tensor]) -> Pending:
        """Begin returning the batches' directions to the shards of this replica."""
        flat = route.parcels.lift(directions, self.wire_dtype, self.device)
        if not route.moves:
            return Pending(flat)
        return collectives.all_to_all(
            flat, route.takes_sizes, route.gives_sizes, self.group, self.meter
        )

    def _spread(self, route: Route, flat: Tensor) -> Pending:
        """Begin exchanging what each replica was given for its own matrices."""
        padding = flat.new_zeros(max(route.given) - flat.numel())
        return collectives.all_gather(torch.cat([flat, padding]), self.replicas, self.meter)

    def _share(self, route: Route, found: list[Tensor]) -> dict[int, Tensor]:
        """Every matrix's number on every rank, bit by bit its owner's."""
        slots = {matrix: slot for slot, matrix in enumerate(route.matrices)}
        numbers = torch.zeros(len(slots), dtype=self.home_dtype, device=self.device)
        computed = [i for which in route.batches for i in which]
        mine = [slots[computed[k]] for k in route.mine]
        if mine:
            numbers[mine] = torch.cat(found)[route.mine].to(numbers.dtype)
        for members in (self.group, self.replicas):
            collectives.sum_ranks(numbers, members, self.meter)
        return dict(zip(route.matrices, numbers.to(self.home_device).unbind(), strict=True))

    def _directions(self, flat: Tensor, pieces: list[Piece]) -> list[Tensor]:
        """The directions of ``pieces``, run by run, at home."""
        home = flat.to(device=self.home_device, dtype=self.home_dtype)
        return list(torch.split(home, [piece.length for piece in pieces]))
