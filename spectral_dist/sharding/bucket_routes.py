"""What one rank does for one bucket: which runs it gives, to whom, and what it makes of arrivals.

All orders are computed here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import Bucket

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


class Packing(Protocol):
    """Between runs in the order of ``BucketRoute.send_runs`` and batches of matrices, on both sides."""

    def pack_to_send(self, runs: Tensor) -> Tensor:
        """Flat runs in the order in which they are sent."""

    def unpack_matrices(self, received: Tensor) -> list[Tensor]:
        """Batches (k, rows, columns), of what has arrived."""

    def pack_directions(
        self, directions: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The inverse of ``unpack_matrices``, flat, of this dtype and on this device."""

    def unpack_directions(self, runs: Tensor) -> Tensor:
        """The inverse of ``pack_to_send``."""


@dataclass(slots=True)
class BucketRoute:
    """What this rank does for one bucket."""

    moves: bool
    packing: Packing
    batches: list[tuple[int, ...]]
    """the matrices of each batch that this rank computes"""
    send_runs: list[Piece] = field(default_factory=list)
    """its runs of the matrices that its replica owns, by owner (``gram``: batch), then matrix, then
    tile; directions of the same runs come back"""
    send_counts: Sequence[int] = ()
    """elements sent to each rank"""
    recv_counts: Sequence[int] = ()
    """elements received from each rank"""
    result_runs: list[Piece] = field(default_factory=list)
    """its runs of all the bucket's matrices, replica by replica: those of which it gets the
    direction"""
    counts_per_replica: list[int] = field(default_factory=list)
    """elements of them that each replica gives"""

    def assign_runs(self, replica: int, order: Sequence[tuple[int, list[Piece]]]) -> None:
        """Note this rank's runs: (the replica that owns their matrix, runs), in order."""
        by_replica: list[list[Piece]] = [[] for _ in self.counts_per_replica]
        for k, pieces in order:
            by_replica[k] += pieces
        self.send_runs = by_replica[replica]
        self.result_runs = [piece for pieces in by_replica for piece in pieces]
        self.counts_per_replica = [sum(piece.length for piece in pieces) for pieces in by_replica]


class WholePacking:
    """Parcels of whole matrices at their owners."""

    def __init__(self, layouts: Sequence[Layout], batches: list[Batch], ranks: int) -> None:
        self.batches = batches
        self.recv_counts = [0] * ranks
        placed: list[tuple[int, int, int]] = []  # (rank, running number, length)
        for i in (i for batch in batches for i in batch.matrices):
            for tile in layouts[i].tiles:
                for holder, begin, end in tile.parts():
                    placed.append((holder, len(placed), end - begin))
                    self.recv_counts[holder] += end - begin
        arriving = sorted(placed)
        # lengths of the runs received, in the order of arrival: by rank, then matrix, then tile
        self._arrivals = [length for _, _, length in arriving]
        # index among the arrivals of the k-th run in the order matrix, tile, rank; its inverse
        self._returning = [number for _, number, _ in arriving]
        self._placing = [0] * len(arriving)
        for arrival, number in enumerate(self._returning):
            self._placing[number] = arrival

    def pack_to_send(self, runs: Tensor) -> Tensor:
        """They are in that order."""
        return runs

    def unpack_matrices(self, received: Tensor) -> list[Tensor]:
        """The owned matrices, (k, m, n) of each batch."""
        if not self.batches:
            return []
        arrived = torch.split(received, self._arrivals)
        flat = torch.cat([arrived[i] for i in self._placing])
        parts = torch.split(flat, [batch.numel for batch in self.batches])
        return [batch.join(part) for batch, part in zip(self.batches, parts, strict=True)]

    def pack_directions(
        self, directions: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """In the order of arrival."""
        cut = [batch.cut(d) for batch, d in zip(self.batches, directions, strict=True)]
        flat = pack(cut, dtype, device)
        if not self._arrivals:
            return flat
        parts = torch.split(flat, [self._arrivals[i] for i in self._placing])
        return torch.cat([parts[i] for i in self._returning])

    def unpack_directions(self, runs: Tensor) -> Tensor:
        """They are in that order."""
        return runs


def batches_of(layouts: Sequence[Layout], mine: Sequence[int]) -> list[Batch]:
    """Whole matrices that can be computed at once."""
    by_shape: dict[tuple[tuple[int, int], bool, Tiles], list[int]] = {}
    for i in mine:
        layout = layouts[i]
        tiles: Tiles = None
        if not layout.stacked():
            tiles = tuple((t.row, t.col, t.rows, t.cols) for t in layout.tiles)
        key = (layout.matrix.shape, layout.matrix.transposed, tiles)
        by_shape.setdefault(key, []).append(i)
    return [Batch(tuple(ids), shape, tiles) for (shape, _, tiles), ids in by_shape.items()]


def pieces_of(layout: Layout, index: int, rank: int) -> list[Piece]:
    """The rank's runs of a matrix, tile by tile."""
    runs = [(tile.tensor, *tile.run(rank)) for tile in layout.tiles]
    return [Piece(tensor, start, length, index) for tensor, start, length in runs if length]


def route_to_owners(
    bucket: Bucket,
    layouts: Sequence[Layout],
    rank: int,
    ranks: int,
    replica: int,
    replicas: int,
    together: bool = True,
) -> BucketRoute:
    """Of a bucket whose matrices are to be whole at their owners; equal shapes ``together``."""
    batches = batches_of(layouts, bucket.matrices.get(replica * ranks + rank, ()))
    if not together:
        batches = [replace(batch, matrices=(i,)) for batch in batches for i in batch.matrices]
    packing = WholePacking(layouts, batches, ranks)
    route = BucketRoute(
        bucket.moves,
        packing,
        [batch.matrices for batch in batches],
        counts_per_replica=[0] * replicas,
    )
    send_counts = [0] * ranks
    route.recv_counts, route.send_counts = packing.recv_counts, send_counts
    order = []
    for owner, matrices in bucket.matrices.items():
        # by shape, as the owner will batch them
        for i in (i for batch in batches_of(layouts, matrices) for i in batch.matrices):
            pieces = pieces_of(layouts[i], i, rank)
            order.append((owner // ranks, pieces))
            if owner // ranks == replica:
                send_counts[owner % ranks] += sum(piece.length for piece in pieces)
    route.assign_runs(replica, order)
    return route


def pack(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One flat tensor of this dtype and device."""
    sizes = [part.numel() for part in parts]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    if parts:  # one pass that casts as it copies
        torch._foreach_copy_(list(torch.split(flat, sizes)), [p.reshape(-1) for p in parts])
    return flat
