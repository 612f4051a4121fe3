"""Layouts of tensor-parallel tiles, stored whole or in flat ranges: arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.layout import Cut, Tile
from spectral_dist.sharding.matrix import Matrix


@dataclass(frozen=True)
class FlatRange:
    """Where a parameter lies in a bucket of which data-parallel ranks store equal runs.

    Attributes:
        start: the index in the bucket of the parameter's first element.
        shard_numel: the number of elements of the bucket that each rank stores.
    """

    start: int
    shard_numel: int

    def bounds(self, numel: int) -> tuple[int, list[int]]:
        """Return (the first rank that stores some of the parameter, bounds of runs from it on).

        Args:
            numel: the parameter's number of elements. Bounds are indices into these, ascending.
        """
        stop = self.start + numel
        first, last = self.start // self.shard_numel, -(-stop // self.shard_numel)
        edges = [rank * self.shard_numel - self.start for rank in range(first, last + 1)]
        return first, [min(max(edge, 0), numel) for edge in edges]


def sharing(
    tiled: bool, flat: bool, tensor: Group, data: Group, joint: Callable[[], Group], replicate: bool
) -> tuple[Group, Group, bool]:
    """Return (ranks that cut, ranks that hold copies, whether every copy has its momentum).

    Args:
        tiled: whether tensor-parallel ranks cut the parameters; they have copies otherwise.
        flat: whether data-parallel ranks store flat ranges; they have copies otherwise.
        tensor, data: the tensor- and the data-parallel ranks.
        joint: returns both together.
        replicate: whether every data-parallel copy has its momentum.
    """
    if not flat:
        return (tensor, data, replicate) if tiled else (None, joint(), replicate)
    return (joint(), None, True) if tiled else (data, tensor, True)


def whole_cuts(numel: int, tensor: int) -> list[Cut]:
    """Return, by tensor-parallel rank, the cut of a tile that the rank stores whole.

    Args:
        numel: of the tile.
        tensor: the number of tensor-parallel ranks that cut the matrix; 1: it is no tile.
    """
    return [Cut((0, numel), (t,) if tensor > 1 else None) for t in range(tensor)]


def flat_cuts(numel: int, flat: FlatRange, ranks: Sequence[Sequence[int]]) -> list[Cut]:
    """Return, by tensor-parallel rank, the cut of a tile of which data-parallel ranks store ranges.

    Args:
        numel: of the tile.
        flat: where every tensor-parallel rank's tile lies, as all build the same buckets.
        ranks: [t][d]: the rank, among those that share the matrix, of tensor rank t and data
            rank d.
    """
    first, bounds = flat.bounds(numel)
    data = slice(first, first + len(bounds) - 1)
    return [Cut(tuple(bounds), tuple(row[data])) for row in ranks]


def tiles_of(
    matrix: Matrix, rows: int, dim: int | None, stride: int, cuts: Sequence[Cut], tensor: int
) -> Iterator[Tile]:
    """Yield the tiles of a matrix, from top to bottom.

    Args:
        matrix: one of the parameter's.
        rows: of the whole parameter.
        dim: the dimension of the parameter that tensor parallelism cuts; None: it cuts none.
        stride: the number of equal parts of its rows that are each cut over all ranks.
        cuts: how each tensor-parallel rank's elements are stored.
        tensor: the index of the local tensor that this rank's elements are in.

    Raises:
        ValueError: columns are cut in several parts, which is not supported.
    """
    width, row = matrix.shape[1], 0
    for start, height in matrix.blocks:
        first = start // width
        if dim == 1 and len(cuts) > 1:
            if stride > 1:
                raise ValueError(
                    f"{matrix.name} has columns cut with stride {stride}, which"
                    " is not supported; leave it to AdamW with scalars=[...]"
                )
            part = width // len(cuts)
            for t, cut in enumerate(cuts):
                yield Tile(row, t * part, height, part, cut, first * part, 0, tensor, block=t)
        else:
            for t, begin, size, local in _segments(rows, len(cuts), stride):
                top, bottom = max(first, begin), min(first + height, begin + size)
                if top < bottom:
                    yield Tile(
                        row + top - first, 0, bottom - top, width, cuts[t],
                        (local + top - begin) * width, 0, tensor, block=t,
                    )  # fmt: skip
        row += height


def _segments(rows: int, ranks: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Return (rank, first row, rows, first row in the rank's tensor) of each piece of a weight.

    The rows are ``stride`` equal parts, each of which is cut over the ranks. A rank's tensor holds
    its piece of the first part, then that of the second, and so on. Pieces are in order of their
    first rows.

    Args:
        rows: of the whole weight.
        ranks: the number of tensor-parallel ranks.
        stride: the number of parts.
    """
    part, piece = rows // stride, rows // stride // ranks
    return [
        (rank, index * part + rank * piece, piece, index * piece)
        for index in range(stride)
        for rank in range(ranks)
    ]
