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


def whole_cuts(numels: Sequence[int]) -> list[Cut]:
    """Return, by tensor-parallel rank, the cut of a tile that the rank stores whole.

    Args:
        numels: of the tiles of the ranks that cut the matrix; of one: it is no tile.
    """
    return [Cut((0, n), (t,) if len(numels) > 1 else None) for t, n in enumerate(numels)]


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


@dataclass(frozen=True, slots=True)
class TilePiece:
    """A rectangle of a parameter that one tensor-parallel rank stores.

    Attributes:
        tensor_rank: the rank.
        row, col: of its first element in the parameter, seen as rows of its matrices' width.
        rows, cols: its size.
        offset: of its first element in the rank's tile.
        pitch: elements of the rank's tile from one row of the piece to the next.
    """

    tensor_rank: int
    row: int
    col: int
    rows: int
    cols: int
    offset: int
    pitch: int


def whole_piece(numel: int, width: int) -> list[TilePiece]:
    """Return the one piece of a parameter that no tensor-parallel rank cuts.

    Args:
        numel: of the parameter.
        width: of its matrices' rows in it.
    """
    return [TilePiece(0, 0, 0, numel // width, width, 0, width)]


def even_pieces(
    name: str, shape: Sequence[int], dim: int, stride: int, ranks: int
) -> list[TilePiece]:
    """Return the pieces of a weight of which every tensor-parallel rank stores as much.

    Args:
        name: of the weight, for the error.
        shape: (rows, columns) of the whole weight.
        dim: the dimension that is cut.
        stride: the number of equal parts of its rows that are each cut over all ranks.
        ranks: the number of tensor-parallel ranks.

    Raises:
        ValueError: columns are cut in several parts, which is not supported.
    """
    rows, width = shape
    if dim == 0:
        return [
            TilePiece(t, begin, 0, size, width, local * width, width)
            for t, begin, size, local in _segments(rows, ranks, stride)
        ]
    if stride > 1:
        raise ValueError(
            f"{name} has columns cut with stride {stride}, which"
            " is not supported; leave it to AdamW with scalars=[...]"
        )
    part = width // ranks
    return [TilePiece(t, 0, t * part, rows, part, 0, part) for t in range(ranks)]


def tiles_of(
    matrix: Matrix, pieces: Sequence[TilePiece], cuts: Sequence[Cut], tensor: int, base: int = 0
) -> Iterator[Tile]:
    """Yield the tiles of a matrix, from top to bottom.

    Args:
        matrix: one of the parameter's.
        pieces: of the parameter, from top to bottom and from left to right; together they are all
            of it.
        cuts: how each tensor-parallel rank's elements are stored.
        tensor: the index of the local tensor that this rank's elements are in.
        base: the element of that tensor at which they begin.
    """
    width, row = matrix.width, 0
    step = 1 if matrix.columns is None else matrix.columns.step
    for start, height in matrix.blocks:
        first = start // width
        for piece in pieces:
            top, bottom = max(first, piece.row), min(first + height, piece.row + piece.rows)
            if top >= bottom:
                continue
            above = (top - piece.row) * piece.pitch
            for col, left, cols in matrix.column_runs(piece.col, piece.col + piece.cols):
                dense = cols == piece.pitch and step == 1
                yield Tile(
                    row + top - first, col, bottom - top, cols, cuts[piece.tensor_rank],
                    piece.offset + above + left - piece.col, base, tensor,
                    block=piece.tensor_rank, pitch=0 if dense else piece.pitch, step=step,
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
