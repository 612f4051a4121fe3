"""Shards -> whole matrices at their owners -> shards -> the shards' replicas, a bucket at a time.

Every move is the same four C++ calls: split flat tensors into pieces, put the pieces in the order
of who needs them, concatenate, one collective. All orders are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter, Pending
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import Bucket, Plan

Tiles: TypeAlias = tuple[tuple[int, int, int, int], ...] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a local tensor that belongs to one matrix."""

    tensor: int
    start: int
    length: int
    matrix: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Matrices of one shape that this rank owns in a bucket, as indices into the layouts."""

    matrices: tuple[int, ...]
    shape: tuple[int, int]
    tiles: Tiles
    """(row, col, rows, cols) of each matrix's tiles in order; None if they are its rows in order"""

    @property
    def numel(self) -> int:
        """Elements of all its matrices."""
        return len(self.matrices) * self.shape[0] * self.shape[1]

    def join(self, flat: Tensor) -> Tensor:
        """The matrices, (k, m, n), from their tiles one after the other."""
        whole = flat.view(len(self.matrices), *self.shape)
        if self.tiles is None:
            return whole
        whole = torch.empty_like(whole)
        start = 0
        for k in range(len(self.matrices)):
            for row, col, rows, cols in self.tiles:
                tile = flat[start : start + rows * cols].view(rows, cols)
                whole[k, row : row + rows, col : col + cols] = tile
                start += rows * cols
        return whole

    def cut(self, whole: Tensor) -> Tensor:
        """The inverse of ``join``, flat."""
        if self.tiles is None:
            return whole.reshape(-1)
        parts = [
            whole[k, row : row + rows, col : col + cols].reshape(-1)
            for k in range(len(self.matrices))
            for row, col, rows, cols in self.tiles
        ]
        return torch.cat(parts)


@dataclass(slots=True)
class Route:
    """What this rank does for one bucket."""

    moves: bool
    matrices: list[int] = field(default_factory=list)
    """all of the bucket's, whoever owns them"""
    gives: list[Piece] = field(default_factory=list)
    """its runs of the matrices that its replica owns, in the order in which it sends them: by
    owner, then matrix, then tile; directions of the same runs come back"""
    gives_sizes: list[int] = field(default_factory=list)
    takes_sizes: list[int] = field(default_factory=list)
    """elements received from each rank"""
    arrivals: list[int] = field(default_factory=list)
    """lengths of the runs received, in the order of arrival: by rank, then matrix, then tile"""
    placing: list[int] = field(default_factory=list)
    """index among the arrivals of the k-th run in the order matrix, tile, rank"""
    returning: list[int] = field(default_factory=list)
    """the inverse of ``placing``"""
    batches: list[Batch] = field(default_factory=list)
    returns: list[Piece] = field(default_factory=list)
    """its runs of all the bucket's matrices, replica by replica: those of which it gets the
    direction"""
    given: list[int] = field(default_factory=list)
    """elements of them that each replica gives"""


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

    def absorb(
        self, pieces: list[Piece], directions: list[Tensor], numbers: list[Tensor]
    ) -> list[Tensor]:
        """The directions after the owner's replica has put them in its momentum."""

    def settle(self, pieces: list[Piece], directions: list[Tensor], numbers: list[Tensor]) -> None:
        """What to do with the directions of these runs of this rank."""


def _batches(layouts: Sequence[Layout], mine: Sequence[int]) -> list[Batch]:
    by_shape: dict[tuple[tuple[int, int], Tiles], list[int]] = {}
    for i in mine:
        layout = layouts[i]
        tiles: Tiles = None
        if not layout.stacked():
            tiles = tuple((t.row, t.col, t.rows, t.cols) for t in layout.tiles)
        by_shape.setdefault((layout.matrix.shape, tiles), []).append(i)
    return [Batch(tuple(ids), shape, tiles) for (shape, tiles), ids in by_shape.items()]


def _pieces(layout: Layout, index: int, rank: int) -> list[Piece]:
    runs = [(tile.tensor, *tile.run(rank)) for tile in layout.tiles]
    return [Piece(tensor, start, length, index) for tensor, start, length in runs if length]


def _route(
    bucket: Bucket, layouts: Sequence[Layout], rank: int, ranks: int, replica: int, replicas: int
) -> Route:
    route = Route(bucket.moves, gives_sizes=[0] * ranks, takes_sizes=[0] * ranks)
    given: list[list[Piece]] = [[] for _ in range(replicas)]
    for owner, matrices in bucket.matrices.items():
        # by shape, as the owner will batch them
        for i in (i for batch in _batches(layouts, matrices) for i in batch.matrices):
            pieces = _pieces(layouts[i], i, rank)
            given[owner // ranks] += pieces
            if owner // ranks == replica:
                route.gives_sizes[owner % ranks] += sum(piece.length for piece in pieces)
            route.matrices.append(i)
    route.gives = given[replica]
    route.returns = [piece for pieces in given for piece in pieces]
    route.given = [sum(piece.length for piece in pieces) for pieces in given]
    route.batches = _batches(layouts, bucket.matrices.get(replica * ranks + rank, ()))
    placed: list[tuple[int, int, int]] = []  # (rank, running number, length)
    for i in (i for batch in route.batches for i in batch.matrices):
        for tile in layouts[i].tiles:
            for holder in tile.holders():
                length = tile.run(holder)[1]
                if length:
                    placed.append((holder, len(placed), length))
                    route.takes_sizes[holder] += length
    arriving = sorted(placed)
    route.arrivals = [length for _, _, length in arriving]
    route.returning = [number for _, number, _ in arriving]
    route.placing = [0] * len(arriving)
    for arrival, (_, number, _) in enumerate(arriving):
        route.placing[number] = arrival
    return route


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
        lines = [f"{x.matrix.name} owner {o}" for x, o in zip(layouts, plan.owners, strict=True)]
        lines += [f"bucket {bucket}" for bucket in plan.buckets] + [f"wire {wire_dtype}"]
        collectives.assert_same(lines, groups, device)
        self.routes = [
            _route(bucket, layouts, rank, ranks, replica, self.copies) for bucket in plan.buckets
        ]
        self.stored = Pieces([piece for route in self.routes for piece in route.returns])
        """this rank's runs of all matrices"""
        self.given = Pieces([piece for route in self.routes for piece in route.gives])
        """this rank's runs of the matrices that its replica owns"""

    def run(self, work: Work) -> None:
        """Take every matrix to its owner and its direction back, bucket by bucket.

        A bucket pauses whenever it has something in flight, and the younger ones go first; so the
        next bucket's exchange is in flight while this one is computed, and this one's return while
        the next is. Two buckets are in memory, three where shards have replicas.
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
        matrices = self._matrices(route, collecting.wait())
        found = [
            work.direction(x, b.matrices) for x, b in zip(matrices, route.batches, strict=True)
        ]
        del matrices
        numbers: dict[int, Tensor] = {}
        if work.numbers:
            numbers = self._share(route, [n for _, n in found if n is not None])
        returning = self._deliver(route, [direction for direction, _ in found])
        del found
        yield
        flat = returning.wait()
        if work.absorbs:
            directions = self._directions(flat, route.gives)
            mine = [numbers[piece.matrix] for piece in route.gives] if numbers else []
            # not rounded again: the momentum has seen the rounded direction already
            flat = _pack(work.absorb(route.gives, directions, mine), self.home_dtype, self.device)
        if self.copies > 1:
            spreading = self._spread(route, flat)
            yield
            parts = spreading.wait().view(self.copies, max(route.given))
            flat = torch.cat([p[:n] for p, n in zip(parts, route.given, strict=True)])
        mine = [numbers[piece.matrix] for piece in route.returns] if numbers else []
        work.settle(route.returns, self._directions(flat, route.returns), mine)

    def _collect(self, route: Route, work: Work) -> Pending:
        """Begin bringing a bucket's matrices to their owners."""
        sent = _pack(work.request(route.gives) if route.gives else [], self.wire_dtype, self.device)
        if not route.moves:
            return Pending(sent)
        return collectives.all_to_all(
            sent, route.gives_sizes, route.takes_sizes, self.group, self.meter
        )

    def _matrices(self, route: Route, received: Tensor) -> list[Tensor]:
        """The bucket's owned matrices, one (k, m, n) tensor in the wire's dtype for each batch."""
        if not route.batches:
            return []
        arrived = torch.split(received, route.arrivals)
        flat = torch.cat([arrived[i] for i in route.placing])
        parts = torch.split(flat, [batch.numel for batch in route.batches])
        return [batch.join(part) for batch, part in zip(route.batches, parts, strict=True)]

    def _deliver(self, route: Route, directions: list[Tensor]) -> Pending:
        """Begin returning the batches' directions to the shards of this replica."""
        cut = [batch.cut(d) for batch, d in zip(route.batches, directions, strict=True)]
        flat = _pack(cut, self.wire_dtype, self.device)
        if route.arrivals:
            parts = torch.split(flat, [route.arrivals[i] for i in route.placing])
            flat = torch.cat([parts[i] for i in route.returning])
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
        mine = [slots[i] for batch in route.batches for i in batch.matrices]
        if mine:
            numbers[mine] = torch.cat(found).to(numbers.dtype)
        for members in (self.group, self.replicas):
            collectives.sum_ranks(numbers, members, self.meter)
        return dict(zip(route.matrices, numbers.to(self.home_device).unbind(), strict=True))

    def _directions(self, flat: Tensor, pieces: list[Piece]) -> list[Tensor]:
        """The directions of ``pieces``, run by run, at home."""
        home = flat.to(device=self.home_device, dtype=self.home_dtype)
        return list(torch.split(home, [piece.length for piece in pieces]))


def _pack(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One flat tensor of this dtype on the exchange's device."""
    sizes = [part.numel() for part in parts]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    if parts:  # one pass that casts as it copies
        torch._foreach_copy_(list(torch.split(flat, sizes)), [p.reshape(-1) for p in parts])
    return flat
