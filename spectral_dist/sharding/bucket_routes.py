"""What one rank sends and receives for one bucket, in which order, and how matrices are packed.

All orders are computed here, once, when the exchange is built; a step only splits, concatenates and
sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from spectral_dist.sharding.boxes import Box, intersect
from spectral_dist.sharding.layout import Layout, Tile
from spectral_dist.sharding.plan import Bucket
from spectral_dist.sharding.two_steps import TwoSteps

Tiles: TypeAlias = tuple[tuple[int, int, int, int], ...] | None
"""(row, col, rows, cols) of each tile of a matrix, in order; None if the tiles one after the other
are the matrix's row-major elements."""


@dataclass(frozen=True, slots=True, eq=False)  # looked up in every step: by identity, not value
class Piece:
    """A run of a local tensor's elements, or a rectangle of it, that belongs to one matrix.

    A rank makes each one once, when its routes are built.

    Attributes:
        tensor: the index of the local tensor.
        start: the first element in the flattened tensor.
        length: the number of elements.
        matrix: the index of the matrix's layout.
        rows: the number of rows; a run has one.
        pitch: from the first element of one row to that of the next.
        step: from one element of a row to the next.
    """

    tensor: int
    start: int
    length: int
    matrix: int
    rows: int = 1
    pitch: int = 0
    step: int = 1

    @property
    def is_run(self) -> bool:
        """Return whether the elements follow one another."""
        return self.rows == 1 and self.step == 1

    @property
    def end(self) -> int:
        """Return the element after the last one, in the flattened tensor."""
        last_row = self.start + (self.rows - 1) * self.pitch
        return last_row + (self.length // self.rows - 1) * self.step + 1

    def view(self, flat: Tensor) -> Tensor:
        """Return the elements of a flattened local tensor as ``shaped`` has them, on its memory."""
        if self.is_run:
            return flat[self.start : self.start + self.length]
        size, first = (self.rows, self.length // self.rows), flat.storage_offset() + self.start
        return flat.as_strided(size, (self.pitch, self.step), first)

    def shaped(self, run: Tensor) -> Tensor:
        """Return as many elements one after the other, flat for a run, (rows, columns) else."""
        return run if self.is_run else run.view(self.rows, -1)


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape and tiling that this rank owns in a bucket and computes in one call.

    Attributes:
        matrices: indices of their layouts.
        shape: (m, n) of each matrix.
        tiles: how each matrix is made of tiles, the same for all.
    """

    matrices: tuple[int, ...]
    shape: tuple[int, int]
    tiles: Tiles

    def chunks(self, size: int) -> list[Batch]:
        """Return the matrices in batches of this size; the last one may have fewer."""
        starts = range(0, len(self.matrices), size)
        return [replace(self, matrices=self.matrices[i : i + size]) for i in starts]

    @property
    def numel(self) -> int:
        """Return the number of elements of all the batch's matrices."""
        return len(self.matrices) * self.shape[0] * self.shape[1]

    def join(self, flat: Tensor) -> Tensor:
        """Return the matrices, (k, m, n), from their tiles' elements one after the other."""
        matrices = flat.view(len(self.matrices), *self.shape)
        if self.tiles is None:
            return matrices
        by_matrix = flat.view(len(self.matrices), -1)
        if self.num_columns:
            tiles = by_matrix.view(len(self.matrices), self.num_columns, self.shape[0], -1)
            return tiles.transpose(1, 2).reshape(matrices.shape)
        matrices = torch.empty_like(matrices)
        for part, (row, col, rows, cols) in zip(self._of_tiles(by_matrix), self.tiles, strict=True):
            matrices[:, row : row + rows, col : col + cols] = part.view(-1, rows, cols)
        return matrices

    def split(self, matrices: Tensor) -> Tensor:
        """Return the tiles' elements one after the other, flat: the inverse of ``join``."""
        if self.tiles is None:
            return matrices.reshape(-1)
        if self.num_columns:
            columns = matrices.view(*matrices.shape[:2], self.num_columns, -1)
            return columns.transpose(1, 2).reshape(-1)
        parts = [
            matrices[:, row : row + rows, col : col + cols].flatten(1)
            for row, col, rows, cols in self.tiles
        ]
        return torch.cat(parts, dim=1).view(-1)

    @cached_property
    def num_columns(self) -> int:
        """Return the number of tiles if these are equal slices of columns, in order; else 0."""
        count = len(self.tiles or ())
        width = self.shape[1] // max(count, 1)
        columns = tuple((0, width * i, self.shape[0], width) for i in range(count))
        return count if self.tiles == columns and count * width == self.shape[1] else 0

    def _of_tiles(self, by_matrix: Tensor) -> Sequence[Tensor]:
        """Split (k, elements of a matrix, tile by tile) into (k, elements) of each tile."""
        return torch.split(by_matrix, [rows * cols for _, _, rows, cols in self.tiles or ()], dim=1)


class Packing(Protocol):
    """How a rank packs its runs to send them, and builds matrices from what it receives; and back.

    Every flat tensor holds elements of one bucket. ``unpack_directions`` and ``pack_directions``
    undo ``pack_to_send`` and ``unpack_matrices``.
    """

    def pack_to_send(self, runs: Tensor) -> Tensor:
        """Return the elements of ``BucketRoute.send_runs``, flat, in the order in which to send."""

    def unpack_matrices(self, received: Tensor) -> list[Tensor]:
        """Return the batches of matrices (k, rows, columns) that the received elements make up."""

    def pack_directions(
        self, directions: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the batches' directions, flat, in the order of the elements that were received.

        Args:
            directions: (k, rows, columns) for each batch.
            dtype, device: of the result.
        """

    def unpack_directions(self, runs: Tensor) -> Tensor:
        """Return the directions that came back, flat, in the order of ``BucketRoute.send_runs``."""


@dataclass(slots=True)
class BucketRoute:
    """What this rank sends, receives and computes for one bucket.

    Attributes:
        moves: whether anything is sent between ranks at all.
        packing: how runs and matrices become what is sent and received.
        batches: the matrices (layout indices) of each batch that this rank computes.
        send_runs: this rank's runs of the matrices that its replica owns, by owner (``gram``: by
            batch), then matrix, then tile; the directions of the same runs come back.
        send_counts: elements sent to each rank.
        recv_counts: elements received from each rank.
        result_runs: this rank's runs of all the bucket's matrices, replica by replica; it gets the
            directions of all of them.
        counts_per_replica: how many elements of ``result_runs`` each replica computes.
        runs_of_replicas: ``result_runs``, by the replica that computes them.
        senders: the replicas that send their directions in turn; empty: all do at once.
        two_steps: how shards travel to owners or slabs, and back, if hosts are passed in between.
    """

    moves: bool
    packing: Packing
    batches: list[tuple[int, ...]]
    send_runs: list[Piece] = field(default_factory=list)
    send_counts: Sequence[int] = ()
    recv_counts: Sequence[int] = ()
    result_runs: list[Piece] = field(default_factory=list)
    counts_per_replica: list[int] = field(default_factory=list)
    runs_of_replicas: list[list[Piece]] = field(default_factory=list)
    senders: Sequence[int] = ()
    two_steps: tuple[TwoSteps, TwoSteps] | None = None

    def assign_runs(self, replica: int, order: Sequence[tuple[int, list[Piece]]]) -> None:
        """Set all fields that hold or count runs, from this rank's runs.

        Args:
            replica: this rank's replica.
            order: (the replica that owns the matrix, this rank's runs of it) for each matrix of
                the bucket, in the order in which they travel.
        """
        by_replica: list[list[Piece]] = [[] for _ in self.counts_per_replica]
        for k, pieces in order:
            by_replica[k] += pieces
        self.send_runs, self.runs_of_replicas = by_replica[replica], by_replica
        self.result_runs = [piece for pieces in by_replica for piece in pieces]
        self.counts_per_replica = [sum(piece.length for piece in pieces) for pieces in by_replica]


class WholePacking:
    """``Packing`` of a bucket whose matrices are brought together whole at their owners.

    Args:
        layouts: of all matrices.
        batches: of the matrices that this rank owns.
        ranks: the number of ranks that share the matrices.

    Attributes:
        recv_counts: the elements that each rank sends to this one.
    """

    def __init__(self, layouts: Sequence[Layout], batches: list[Batch], ranks: int) -> None:
        self.batches = batches
        self.recv_counts = [0] * ranks
        placed: list[tuple[int, int, int]] = []  # (rank, running number, length)
        for i in (i for batch in batches for i in batch.matrices):
            for tile in layouts[i].tiles:
                for holder, begin, end in tile.parts():
                    placed.append((holder, len(placed), end - begin))
                    self.recv_counts[holder] += end - begin
        by_sender = sorted(placed)
        # lengths of the runs in the order in which they are received: by rank, then matrix, tile
        self._recv_lengths = [length for _, _, length in by_sender]
        # matrices are made of the same runs in another order: matrix, tile, rank. For each received
        # run its place in that order, and the inverse
        self._place_of_received = [number for _, number, _ in by_sender]
        self._received_at_place = [0] * len(by_sender)
        for index, number in enumerate(self._place_of_received):
            self._received_at_place[number] = index
        self._lengths_at_place = [self._recv_lengths[i] for i in self._received_at_place]
        self._is_in_order = self._place_of_received == list(range(len(by_sender)))

    def pack_to_send(self, runs: Tensor) -> Tensor:
        """Return the runs unchanged: ``send_runs`` has them by owner already."""
        return runs

    def unpack_matrices(self, received: Tensor) -> list[Tensor]:
        """Return the owned matrices, (k, m, n) for each batch, built from the received runs."""
        if not self.batches:
            return []
        flat = received
        if not self._is_in_order:
            received_runs = torch.split(received, self._recv_lengths)
            flat = torch.cat([received_runs[i] for i in self._received_at_place])
        parts = torch.split(flat, [batch.numel for batch in self.batches])
        return [batch.join(part) for batch, part in zip(self.batches, parts, strict=True)]

    def pack_directions(
        self, directions: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the owned matrices' directions, flat, run by run as they were received."""
        tiles = [batch.split(d) for batch, d in zip(self.batches, directions, strict=True)]
        flat = pack(tiles, dtype, device)
        if self._is_in_order:
            return flat
        parts = torch.split(flat, self._lengths_at_place)
        return torch.cat([parts[i] for i in self._place_of_received])

    def unpack_directions(self, runs: Tensor) -> Tensor:
        """Return the directions unchanged: they come back in the order of ``send_runs``."""
        return runs


def batches_of(layouts: Sequence[Layout], indices: Sequence[int]) -> list[Batch]:
    """Group matrices of one shape, orientation and tiling into batches.

    Args:
        layouts: of all matrices.
        indices: of the matrices that are to be computed.
    """
    by_shape: dict[tuple[tuple[int, int], bool, Tiles], list[int]] = {}
    for i in indices:
        layout = layouts[i]
        tiles: Tiles = None
        if not layout.stacked():
            tiles = tuple((t.row, t.col, t.rows, t.cols) for t in layout.tiles)
        key = (layout.matrix.shape, layout.matrix.transposed, tiles)
        by_shape.setdefault(key, []).append(i)
    return [Batch(tuple(ids), shape, tiles) for (shape, _, tiles), ids in by_shape.items()]


def pieces_of(layout: Layout, index: int, rank: int) -> list[Piece]:
    """Return the rank's pieces of a matrix, tile by tile; ``index`` is that of its layout."""
    return [piece for tile in layout.tiles for piece in tile_pieces(tile, index, rank)]


def tile_pieces(tile: Tile, index: int, rank: int) -> list[Piece]:
    """Return the rank's pieces of a tile, in the order of its elements.

    Args:
        tile: the tile.
        index: that of the layout.
        rank: whose pieces they are.
    """
    begin, end = tile.part(rank)
    if begin == end:
        return []
    if not tile.pitch:
        return [Piece(tile.tensor, tile.local(begin, rank), end - begin, index)]
    pieces = []
    for box in intersect(tile, begin, end, Box(tile.row, tile.col, tile.rows, tile.cols)):
        start = tile.local((box.row - tile.row) * tile.cols + box.col - tile.col, rank)
        pieces.append(Piece(tile.tensor, start, box.numel, index, box.rows, tile.pitch, tile.step))
    return pieces


def route_to_owners(
    bucket: Bucket,
    layouts: Sequence[Layout],
    rank: int,
    ranks: int,
    replica: int,
    replicas: int,
    divide: Callable[[Batch], list[Batch]] = lambda batch: [batch],
) -> BucketRoute:
    """Return this rank's route for a bucket whose matrices are brought together at their owners.

    Args:
        bucket: the matrices and their owners.
        layouts: of all matrices.
        rank: this rank in its replica.
        ranks: the number of ranks of a replica.
        replica: this rank's replica.
        replicas: the number of replicas.
        divide: matrices of one shape into those that are computed in one call.
    """
    batches = [
        part
        for batch in batches_of(layouts, bucket.matrices.get(replica * ranks + rank, ()))
        for part in divide(batch)
    ]
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
        # by shape, because the owner expects them in the order of its batches
        for i in (i for batch in batches_of(layouts, matrices) for i in batch.matrices):
            pieces = pieces_of(layouts[i], i, rank)
            order.append((owner // ranks, pieces))
            if owner // ranks == replica:
                send_counts[owner % ranks] += sum(piece.length for piece in pieces)
    route.assign_runs(replica, order)
    return route


def pack(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy tensors one after the other into one new flat tensor of this dtype and device.

    Args:
        parts: of any shapes and dtypes.
        dtype, device: of the result.
    """
    parts = [part if part.ndim == 1 else part.reshape(-1) for part in parts]
    if parts and all(part.dtype == dtype and part.device == device for part in parts):
        return torch.cat(parts)
    sizes = [part.numel() for part in parts]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    if parts:  # one pass that casts as it copies
        torch._foreach_copy_(list(torch.split(flat, sizes)), parts)
    return flat
