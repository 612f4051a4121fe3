"""Shards -> slabs -> shards: how a bucket is packed whose matrices stay cut along their long side.

A run of a row-major tile meets a slab in up to three rectangles. They travel in one order; sender
and receiver read or write them as strided views of their own flat tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from spectral_dist.sharding.boxes import Box, Slabs, intersect, parts_in, slabs
from spectral_dist.sharding.bucket_routes import BucketRoute, Piece, pack, pieces_of
from spectral_dist.sharding.layout import Layout, Tile
from spectral_dist.sharding.plan import Bucket


@dataclass(frozen=True, slots=True)
class SlabBatch:
    """Matrices of one shape and one cut, of each of which this rank has a slab in a bucket.

    Attributes:
        matrices: indices of their layouts.
        owners: the rank among those of the slabs that owns each one, ascending.
        shape: (m, n) of the whole matrices.
        cut: how each matrix is cut into slabs.
        box: this rank's slab of each.
        team: the ranks that have slabs; None: all of the group.
    """

    matrices: tuple[int, ...]
    owners: tuple[int, ...]
    shape: tuple[int, int]
    cut: Slabs
    box: Box
    team: range | None = None

    @property
    def numel(self) -> int:
        """Return the number of elements of this rank's slabs."""
        return len(self.matrices) * self.box.numel


class Rectangles:
    """A sequence of rectangles of a flat tensor, gathered into and scattered from a packed one.

    Args:
        rectangles: (first element, rows, stride, width) of each, in the order of the packed tensor;
            neighbours that are contiguous are joined.
        numel: the number of elements of the flat tensor.
    """

    def __init__(self, rectangles: Iterable[tuple[int, int, int, int]], numel: int) -> None:
        self.numel = numel
        self._parts: list[tuple[int, int, int, int]] = []
        for offset, rows, stride, width in rectangles:
            if rows == 1 or stride == width:  # contiguous
                rows, stride, width = 1, rows * width, rows * width
                if self._parts:
                    first, count, _, length = self._parts[-1]
                    if count == 1 and first + length == offset:
                        self._parts[-1] = (first, 1, length + width, length + width)
                        continue
            self._parts.append((offset, rows, stride, width))
        self._in_order = not numel or self._parts == [(0, 1, numel, numel)]

    def gather(self, flat: Tensor) -> Tensor:
        """Return the rectangles of a flat tensor, packed one after the other."""
        if self._in_order:
            return flat
        packed = flat.new_empty(sum(rows * width for _, rows, _, width in self._parts))
        self._copy(list(self._packed(packed)), list(self._views(flat)))
        return packed

    def scatter(self, packed: Tensor) -> Tensor:
        """Return a flat tensor of ``numel`` elements, filled with packed rectangles."""
        if self._in_order:
            return packed
        flat = packed.new_empty(self.numel)
        self._copy(list(self._views(flat)), list(self._packed(packed)))
        return flat

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        if targets:
            torch._foreach_copy_(targets, sources)

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        begin = flat.storage_offset()
        for offset, rows, stride, width in self._parts:
            yield flat.as_strided((rows, width), (stride, 1), begin + offset)

    def _packed(self, packed: Tensor) -> Iterator[Tensor]:
        begin = packed.storage_offset()
        for _, rows, _, width in self._parts:
            yield packed.as_strided((rows, width), (width, 1), begin)
            begin += rows * width


class SlabPacking:
    """``Packing`` of a bucket whose matrices stay in slabs.

    Args:
        batches: of which this rank has slabs.
        outgoing: where what this rank sends lies in its runs, in the order of sending.
        incoming: where what it receives lies in its slabs, in the order of receiving.
    """

    def __init__(
        self, batches: list[SlabBatch], outgoing: Rectangles, incoming: Rectangles
    ) -> None:
        self.batches, self._outgoing, self._incoming = batches, outgoing, incoming

    def pack_to_send(self, runs: Tensor) -> Tensor:
        """Return the runs' elements by receiving rank, then batch, matrix, tile, rectangle."""
        return self._outgoing.gather(runs)

    def unpack_matrices(self, received: Tensor) -> list[Tensor]:
        """Return this rank's slabs, (k, rows, columns) for each batch; rows or columns may be 0."""
        flat = self._incoming.scatter(received)
        parts = torch.split(flat, [batch.numel for batch in self.batches])
        return [
            part.view(len(batch.matrices), batch.box.rows, batch.box.cols)
            for batch, part in zip(self.batches, parts, strict=True)
        ]

    def pack_directions(
        self, directions: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the slabs' directions, flat, in the order in which the slabs were received."""
        return self._incoming.gather(pack(directions, dtype, device))

    def unpack_directions(self, runs: Tensor) -> Tensor:
        """Return the directions that came back, flat, in the order of the runs."""
        return self._outgoing.scatter(runs)


def slab_batches(
    layouts: Sequence[Layout], owners: dict[int, list[int]], rank: int, ranks: int, size: int = 1
) -> list[SlabBatch]:
    """Group one replica's matrices of a bucket into batches of one shape, orientation and cut.

    The batches are equal on all the replica's ranks, except for ``SlabBatch.box``.

    Args:
        layouts: of all matrices.
        owners: the indices of each owner's matrices; an owner is a rank of the replica.
        rank: this rank in its replica.
        ranks: the number of ranks of a replica.
        size: of the team that works on each matrix; 1: all ranks do.
    """
    Key: TypeAlias = tuple[tuple[int, int], bool, Slabs, range | None]
    by_cut: dict[Key, list[tuple[int, int]]] = {}
    for owner, matrices in sorted(owners.items()):
        team = range(owner - owner % size, owner - owner % size + size) if size > 1 else None
        for i in matrices:
            matrix = layouts[i].matrix
            key = (matrix.shape, matrix.transposed, slabs(layouts[i], ranks, team), team)
            by_cut.setdefault(key, []).append((owner - (team.start if team else 0), i))
    return [
        SlabBatch(
            tuple(i for _, i in owners_and_indices),
            tuple(owner for owner, _ in owners_and_indices),
            shape,
            cut,
            cut.box(rank, shape),
            team,
        )
        for (shape, _, cut, team), owners_and_indices in by_cut.items()
    ]


def route_to_slabs(
    bucket: Bucket, layouts: Sequence[Layout], rank: int, ranks: int, replica: int, replicas: int
) -> tuple[BucketRoute, list[SlabBatch]]:
    """Return this rank's route for a bucket of ``gram`` or ``split``, and its batches of it.

    Args:
        bucket: the matrices and their owners.
        layouts: of all matrices.
        rank: this rank in its replica.
        ranks: the number of ranks of a replica.
        replica: this rank's replica.
        replicas: the number of replicas.
    """
    order = []
    batches: list[SlabBatch] = []
    for k in range(replicas):
        owners = {o % ranks: each for o, each in bucket.matrices.items() if o // ranks == k}
        replica_batches = slab_batches(layouts, owners, rank, ranks, bucket.team)
        if k == replica:
            batches = replica_batches
        order += [(k, pieces_of(layouts[i], i, rank)) for b in replica_batches for i in b.matrices]
    cuts = tuple(
        (batch.shape, batch.cut, tuple(layouts[i].storage() for i in batch.matrices))
        for batch in batches
    )
    outgoing, send_counts, incoming, recv_counts = _transfers(cuts, rank, ranks)
    batches = [batch for batch in batches if batch.team is None or rank in batch.team]
    route = BucketRoute(
        bucket.moves,
        SlabPacking(batches, outgoing, incoming),
        [batch.matrices for batch in batches],
        send_counts=send_counts,
        recv_counts=recv_counts,
        counts_per_replica=[0] * replicas,
    )
    route.assign_runs(replica, order)
    return route, batches


def route_in_replicas(
    bucket: Bucket, layouts: Sequence[Layout], replica: int, replicas: int
) -> tuple[BucketRoute, list[SlabBatch]]:
    """Return this rank's route for a bucket of ``split`` whose matrices every replica stores whole.

    A replica takes its slab out of what it stores, and the directions of all slabs go to all.

    Args:
        bucket: the matrices and their owners, which are replicas.
        layouts: of all matrices.
        replica: this replica.
        replicas: the number of replicas.
    """
    all_batches = slab_batches(layouts, bucket.matrices, replica, replicas, bucket.team)
    order = [
        (k, slab_pieces(layouts[i], i, batch.cut.box(k, batch.shape)))
        for batch in all_batches
        for i in batch.matrices
        for k in batch.team or ()
    ]
    batches = [batch for batch in all_batches if batch.team and replica in batch.team]
    numel = sum(batch.numel for batch in batches)
    nothing_moves = Rectangles([(0, 1, numel, numel)], numel)
    packing = SlabPacking(batches, nothing_moves, nothing_moves)
    indices = [batch.matrices for batch in batches]
    route = BucketRoute(False, packing, indices, counts_per_replica=[0] * replicas)
    route.assign_runs(replica, order)
    return route, batches


def slab_pieces(layout: Layout, index: int, box: Box) -> list[Piece]:
    """Return the pieces of a matrix that a box of it is, if this rank stores the matrix whole.

    Args:
        layout: whose tiles are stacked.
        index: that of the layout.
        box: whole rows of the matrix, or whole columns.
    """
    pieces = []
    for tile in layout.tiles:
        top, bottom = max(tile.row, box.row), min(tile.row + tile.rows, box.row + box.rows)
        rows, first = bottom - top, (top - tile.row) * tile.cols + box.col
        if rows <= 0 or not box.cols:
            continue
        start, numel = tile.local(first, 0), rows * box.cols
        if tile.pitch or box.cols < tile.cols:
            pitch = tile.pitch or tile.cols
            pieces.append(Piece(tile.tensor, start, numel, index, rows, pitch, tile.step))
        else:
            pieces.append(Piece(tile.tensor, start, numel, index))
    return pieces


Cuts: TypeAlias = tuple[tuple[tuple[int, int], Slabs, tuple[tuple[Tile, ...], ...]], ...]
"""(shape, slabs, the storage of each matrix) for each batch."""


@lru_cache(maxsize=64)
def _transfers(
    cuts: Cuts, rank: int, ranks: int
) -> tuple[Rectangles, Sequence[int], Rectangles, Sequence[int]]:
    """Compute which rectangles travel between this rank's runs and the ranks' slabs.

    The result is cached for all buckets whose matrices are cut alike.

    Returns:
        The rectangles of its runs that this rank sends, and how many elements go to each rank; the
        rectangles of its slabs that it receives, and how many elements come from each rank.
    """
    outgoing, incoming = _TransferIndex(), _TransferIndex()
    for shape, cut, storages in cuts:
        slab = cut.box(rank, shape)
        for storage in storages:
            for tile in storage:
                begin, end = tile.part(rank)
                for other, box in cut.overlapping(tile, begin, end, shape):
                    outgoing.add(
                        other, intersect(tile, begin, end, box), tile, outgoing.numel - begin
                    )
                outgoing.numel += end - begin
                for other, first, last in parts_in(tile, slab):
                    incoming.add(other, intersect(tile, first, last, slab), slab, incoming.numel)
            incoming.numel += slab.numel
    return *outgoing.packed(ranks), *incoming.packed(ranks)


class _TransferIndex:
    """The rectangles of a flat tensor of this rank that travel, collected by the other rank.

    Attributes:
        numel: elements of the flat tensor; whoever adds rectangles advances it.
    """

    def __init__(self) -> None:
        self.numel = 0
        self._parts: list[tuple[int, int, tuple[int, int, int, int]]] = []
        self._counts: dict[int, int] = {}

    def add(self, other: int, boxes: Iterable[Box], frame: Box | Tile, base: int) -> None:
        """Add boxes that are sent to, or received from, rank ``other``.

        Args:
            other: the other rank.
            boxes: rectangles of the matrix, inside of the frame.
            frame: the row-major rectangle of the matrix that the flat tensor stores them in.
            base: where the frame's first element is, or would be, in the flat tensor.
        """
        for box in boxes:
            first = base + (box.row - frame.row) * frame.cols + box.col - frame.col
            self._parts.append((other, len(self._parts), (first, box.rows, frame.cols, box.cols)))
            self._counts[other] = self._counts.get(other, 0) + box.numel

    def packed(self, ranks: int) -> tuple[Rectangles, Sequence[int]]:
        """Return all rectangles, rank by rank as they travel, and the elements of each rank."""
        counts = [0] * ranks
        for other, count in self._counts.items():
            counts[other] = count
        return Rectangles((part for _, _, part in sorted(self._parts)), self.numel), tuple(counts)
