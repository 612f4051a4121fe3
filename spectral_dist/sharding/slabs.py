"""Shards -> slabs -> shards: the parcels of a bucket whose matrices stay cut along their long side.

A run of a row-major tile meets a slab in up to three rectangles. They travel in one order; each end
reads or writes them as strided views of its own flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from spectral_dist.sharding.boxes import Box, Slabs, intersect, parts_in, slabs
from spectral_dist.sharding.bucket_routes import BucketRoute, pack, pieces_of
from spectral_dist.sharding.layout import Layout, Tile
from spectral_dist.sharding.plan import Bucket


@dataclass(frozen=True, slots=True)
class SlabBatch:
    """Matrices of one shape and one cut, of each of which this rank has a slab in a bucket."""

    matrices: tuple[int, ...]
    owners: tuple[int, ...]
    """the rank of the group that evaluates each one's polynomial, ascending"""
    shape: tuple[int, int]
    """of the whole matrices"""
    cut: Slabs
    box: Box
    """this rank's slab"""

    @property
    def numel(self) -> int:
        """Elements of this rank's slabs."""
        return len(self.matrices) * self.box.numel


class Rectangles:
    """Rectangles of a flat tensor in an order: (first element, rows, stride, width) of each."""

    def __init__(self, found: Iterable[tuple[int, int, int, int]], numel: int) -> None:
        self.numel = numel
        self._parts: list[tuple[int, int, int, int]] = []
        for offset, rows, stride, width in found:
            if rows == 1 or stride == width:  # a run
                rows, stride, width = 1, rows * width, rows * width
                if self._parts:
                    first, count, _, length = self._parts[-1]
                    if count == 1 and first + length == offset:
                        self._parts[-1] = (first, 1, length + width, length + width)
                        continue
            self._parts.append((offset, rows, stride, width))
        self._in_order = not numel or self._parts == [(0, 1, numel, numel)]

    def gather(self, flat: Tensor) -> Tensor:
        """The rectangles out of it, one after the other."""
        if self._in_order:
            return flat
        packed = flat.new_empty(sum(rows * width for _, rows, _, width in self._parts))
        self._copy(list(self._packed(packed)), list(self._views(flat)))
        return packed

    def scatter(self, packed: Tensor) -> Tensor:
        """The inverse: a flat tensor of ``numel`` elements, which they fill."""
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
        at = packed.storage_offset()
        for _, rows, _, width in self._parts:
            yield packed.as_strided((rows, width), (width, 1), at)
            at += rows * width


class SlabPacking:
    """Parcels of slabs; ``Packing``."""

    def __init__(self, batches: list[SlabBatch], leaving: Rectangles, landing: Rectangles) -> None:
        self.batches, self._leaving, self._landing = batches, leaving, landing

    def pack_to_send(self, runs: Tensor) -> Tensor:
        """By rank, then batch, matrix, tile, rectangle."""
        return self._leaving.gather(runs)

    def unpack_matrices(self, received: Tensor) -> list[Tensor]:
        """This rank's slabs, (k, rows, columns) of each batch; rows or columns may be 0."""
        flat = self._landing.scatter(received)
        parts = torch.split(flat, [batch.numel for batch in self.batches])
        return [
            part.view(len(batch.matrices), batch.box.rows, batch.box.cols)
            for batch, part in zip(self.batches, parts, strict=True)
        ]

    def pack_directions(
        self, directions: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """In the order of arrival."""
        return self._landing.gather(pack(directions, dtype, device))

    def unpack_directions(self, runs: Tensor) -> Tensor:
        """In the order of the runs."""
        return self._leaving.scatter(runs)


def slab_batches(
    layouts: Sequence[Layout], owners: dict[int, list[int]], rank: int, ranks: int
) -> list[SlabBatch]:
    """Of one replica's matrices, by owner; equal on all its ranks but for their own slab."""
    by_cut: dict[tuple[tuple[int, int], bool, Slabs], list[tuple[int, int]]] = {}
    for owner, matrices in sorted(owners.items()):
        for i in matrices:
            matrix = layouts[i].matrix
            key = (matrix.shape, matrix.transposed, slabs(layouts[i], ranks))
            by_cut.setdefault(key, []).append((owner % ranks, i))
    return [
        SlabBatch(
            tuple(i for _, i in found),
            tuple(owner for owner, _ in found),
            shape,
            cut,
            cut.box(rank, shape),
        )
        for (shape, _, cut), found in by_cut.items()
    ]


def route_to_slabs(
    bucket: Bucket, layouts: Sequence[Layout], rank: int, ranks: int, replica: int, replicas: int
) -> tuple[BucketRoute, list[SlabBatch]]:
    """Of a bucket of ``gram``, and this replica's batches of it."""
    order = []
    batches: list[SlabBatch] = []
    for k in range(replicas):
        owners = {o: found for o, found in bucket.matrices.items() if o // ranks == k}
        found = slab_batches(layouts, owners, rank, ranks)
        if k == replica:
            batches = found
        order += [(k, pieces_of(layouts[i], i, rank)) for b in found for i in b.matrices]
    cuts = tuple(
        (batch.shape, batch.cut, tuple(layouts[i].storage() for i in batch.matrices))
        for batch in batches
    )
    leaving, send_counts, landing, recv_counts = _ends(cuts, rank, ranks)
    route = BucketRoute(
        bucket.moves,
        SlabPacking(batches, leaving, landing),
        [batch.matrices for batch in batches],
        send_counts=send_counts,
        recv_counts=recv_counts,
        counts_per_replica=[0] * replicas,
    )
    route.assign_runs(replica, order)
    return route, batches


Cuts: TypeAlias = tuple[tuple[tuple[int, int], Slabs, tuple[tuple[Tile, ...], ...]], ...]
"""Of each batch: the shape, the slabs, how each matrix is stored."""


@lru_cache(maxsize=64)
def _ends(
    cuts: Cuts, rank: int, ranks: int
) -> tuple[Rectangles, Sequence[int], Rectangles, Sequence[int]]:
    """This rank's runs by the slabs that they meet, and how much goes to each rank; and where in
    its slabs what arrives belongs, and how much comes from each rank.

    Once for all buckets whose matrices are cut alike.
    """
    leaving, landing = _End(), _End()
    for shape, cut, storages in cuts:
        slab = cut.box(rank, shape)
        for storage in storages:
            for tile in storage:
                begin, end = tile.part(rank)
                for other, box in cut.overlapping(tile, begin, end, shape):
                    leaving.add(
                        other, intersect(tile, begin, end, box), tile, leaving.numel - begin
                    )
                leaving.numel += end - begin
                for other, first, last in parts_in(tile, slab):
                    landing.add(other, intersect(tile, first, last, slab), slab, landing.numel)
            landing.numel += slab.numel
    return *leaving.packed(ranks), *landing.packed(ranks)


class _End:
    """Where what travels lies in a flat tensor of ``numel`` elements of this rank."""

    def __init__(self) -> None:
        self.numel = 0
        self._parts: list[tuple[int, int, tuple[int, int, int, int]]] = []
        self._sizes: dict[int, int] = {}

    def add(self, other: int, boxes: Iterable[Box], frame: Box | Tile, base: int) -> None:
        """Boxes that go to ``other`` or come from it, of a row-major frame that is at ``base``."""
        for box in boxes:
            first = base + (box.row - frame.row) * frame.cols + box.col - frame.col
            self._parts.append((other, len(self._parts), (first, box.rows, frame.cols, box.cols)))
            self._sizes[other] = self._sizes.get(other, 0) + box.numel

    def packed(self, ranks: int) -> tuple[Rectangles, Sequence[int]]:
        """All in the order in which they travel, rank by rank; the elements of each rank."""
        sizes = [0] * ranks
        for other, size in self._sizes.items():
            sizes[other] = size
        return Rectangles((part for _, _, part in sorted(self._parts)), self.numel), tuple(sizes)
