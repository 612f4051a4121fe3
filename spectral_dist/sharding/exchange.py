"""Shards -> whole matrices at their owners -> shards, a bucket at a time.

Every move is the same four C++ calls: split flat tensors into pieces, put the pieces in the order
of who needs them, concatenate, one collective. All orders are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

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
    gives: list[Piece] = field(default_factory=list)
    """its runs, in the order in which it sends them: by owner, then matrix, then tile"""
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
    """the runs of which it gets the direction, in the order of arrival"""
    padded: int = 0
    """replicated: elements that each owner contributes to the all-gather, padding included"""
    owned: list[int] = field(default_factory=list)
    """replicated: elements of them that are not padding, per owner"""


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


def _sharded_route(bucket: Bucket, layouts: Sequence[Layout], rank: int, ranks: int) -> Route:
    route = Route(bucket.moves, gives_sizes=[0] * ranks, takes_sizes=[0] * ranks)
    for owner, matrices in bucket.matrices.items():
        # by shape, as the owner will batch them
        for i in (i for batch in _batches(layouts, matrices) for i in batch.matrices):
            pieces = _pieces(layouts[i], i, rank)
            route.gives += pieces
            route.gives_sizes[owner] += sum(piece.length for piece in pieces)
    route.batches = _batches(layouts, bucket.matrices.get(rank, ()))
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
    route.returns = route.gives
    return route


def _replicated_route(bucket: Bucket, layouts: Sequence[Layout], rank: int, ranks: int) -> Route:
    route = Route(bucket.moves, owned=[0] * ranks)
    for owner in range(ranks):
        for i in (i for b in _batches(layouts, bucket.matrices.get(owner, ())) for i in b.matrices):
            route.returns += _pieces(layouts[i], i, 0)
            route.owned[owner] += layouts[i].matrix.numel
    route.padded = max(route.owned)
    route.batches = _batches(layouts, bucket.matrices.get(rank, ()))
    for i in (i for batch in route.batches for i in batch.matrices):
        route.gives += _pieces(layouts[i], i, 0)
    route.arrivals = [piece.length for piece in route.gives]
    route.placing = route.returning = list(range(len(route.gives)))
    return route


class Exchange:
    """Moves the shards of one list of layouts to owners and back, along a plan.

    Args:
        layouts: where each matrix lives; equal on all ranks, which is checked here, once.
        plan: who owns what, and in which bucket.
        group: the ranks that share the matrices; None for this process alone.
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
    ) -> None:
        self.home_device, self.home_dtype = home.device, home.dtype
        self.group, self.device, self.wire_dtype, self.meter = group, device, wire_dtype, meter
        rank, ranks = collectives.rank(group), collectives.size(group)
        collectives.assert_same([layout.describe() for layout in layouts], group, device)
        lines = [f"{x.matrix.name} owner {o}" for x, o in zip(layouts, plan.owners, strict=True)]
        lines += [f"bucket {bucket}" for bucket in plan.buckets] + [f"wire {wire_dtype}"]
        collectives.assert_same(lines, group, device)
        self.replicated = ranks > 1 and any(layout.replicated for layout in layouts)
        route = _replicated_route if self.replicated else _sharded_route
        self.routes = [route(bucket, layouts, rank, ranks) for bucket in plan.buckets]
        self.pieces = sorted(
            {piece for r in self.routes for piece in (*r.gives, *r.returns)},
            key=lambda piece: (piece.tensor, piece.start),
        )
        self._splits = self._split_sizes()

    def _split_sizes(self) -> dict[int, list[int]]:
        """For each local tensor, alternating lengths: not ours, piece, not ours, piece, ..."""
        sizes: dict[int, list[int]] = {}
        ends: dict[int, int] = {}
        for piece in self.pieces:
            sizes.setdefault(piece.tensor, []).extend(
                (piece.start - ends.get(piece.tensor, 0), piece.length)
            )
            ends[piece.tensor] = piece.start + piece.length
        return sizes

    def views(self, tensors: Sequence[Tensor]) -> dict[Piece, Tensor]:
        """Flat views of every piece of the local tensors."""
        views: list[Tensor] = []
        for index, sizes in self._splits.items():
            flat = tensors[index].detach().view(-1)
            views += torch.split(flat, [*sizes, flat.numel() - sum(sizes)])[1::2]
        return dict(zip(self.pieces, views, strict=True))

    def run(
        self,
        request: Callable[[list[Piece]], list[Tensor]],
        direction: Callable[[Tensor], Tensor],
        settle: Callable[[list[Piece], list[Tensor]], None],
    ) -> None:
        """Take every matrix to its owner and its direction back, bucket by bucket.

        The next bucket's exchange is in flight while this one is computed, and this one's return
        while the next is; so two buckets are in memory.

        Args:
            request: what must be orthogonalized of these runs of this rank.
            direction: of a batch of whole matrices (k, m, n) in the wire's dtype.
            settle: what to do with the directions of these runs.
        """
        if not self.routes:
            return
        collection = self._collect(self.routes[0], request)
        returning: tuple[Route, Pending] | None = None
        for number, route in enumerate(self.routes):
            arrived = collection.wait()
            if number + 1 < len(self.routes):
                collection = self._collect(self.routes[number + 1], request)
            directions = [direction(batch) for batch in self._matrices(route, arrived)]
            if returning is not None:
                settle(returning[0].returns, self._directions(*returning))
            returning = route, self._deliver(route, directions)
        if returning is not None:
            settle(returning[0].returns, self._directions(*returning))

    def _collect(self, route: Route, request: Callable[[list[Piece]], list[Tensor]]) -> Pending:
        """Begin bringing a bucket's matrices to their owners."""
        sent = self._pack(request(route.gives) if route.gives else [])
        if self.replicated or not route.moves:
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
        """Begin returning the batches' directions to whoever stores the matrices."""
        flat = self._pack([b.cut(d) for b, d in zip(route.batches, directions, strict=True)])
        if self.replicated:
            padding = flat.new_zeros(route.padded - flat.numel())
            return collectives.all_gather(torch.cat([flat, padding]), self.group, self.meter)
        if route.arrivals:
            parts = torch.split(flat, [route.arrivals[i] for i in route.placing])
            flat = torch.cat([parts[i] for i in route.returning])
        if not route.moves:
            return Pending(flat)
        return collectives.all_to_all(
            flat, route.takes_sizes, route.gives_sizes, self.group, self.meter
        )

    def _directions(self, route: Route, pending: Pending) -> list[Tensor]:
        """The directions of ``route.returns``, run by run."""
        received = pending.wait().to(device=self.home_device, dtype=self.home_dtype)
        if self.replicated:
            parts = received.view(-1, route.padded)
            received = torch.cat([p[:n] for p, n in zip(parts, route.owned, strict=True)])
        return list(torch.split(received, [piece.length for piece in route.returns]))

    def _pack(self, parts: list[Tensor]) -> Tensor:
        """One flat tensor of the wire's dtype on the exchange's device."""
        sizes = [part.numel() for part in parts]
        flat = torch.empty(sum(sizes), dtype=self.wire_dtype, device=self.device)
        if parts:  # one pass that casts as it copies
            torch._foreach_copy_(list(torch.split(flat, sizes)), [p.reshape(-1) for p in parts])
        return flat
