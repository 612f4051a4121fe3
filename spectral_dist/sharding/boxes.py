"""Rectangles of a matrix: slabs of strategy ``gram``, blocks of ``block``, what ranks store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from spectral_dist.sharding.layout import Cut, Layout, Tile
from spectral_dist.sharding.matrix import Matrix


class Box(NamedTuple):
    """Rows [row, row + rows) and columns [col, col + cols) of a matrix."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Return the number of elements in the box."""
        return self.rows * self.cols


def union(boxes: Sequence[Box]) -> Box | None:
    """Return the box that disjoint boxes fill together, or None if their union is no box."""
    row, col = min(b.row for b in boxes), min(b.col for b in boxes)
    bottom, right = max(b.row + b.rows for b in boxes), max(b.col + b.cols for b in boxes)
    bounding = Box(row, col, bottom - row, right - col)
    return bounding if bounding.numel == sum(b.numel for b in boxes) else None


def stored_rows(tile: Tile, rank: int) -> Box | None:
    """Return the box that the rank stores of a tile, or None if it is not a set of whole rows."""
    return _whole_rows(tile, *tile.part(rank))


def _whole_rows(tile: Tile, begin: int, end: int) -> Box | None:
    """Return elements [begin, end) of a row-major tile as a box, or None if they split a row."""
    if begin % tile.cols or end % tile.cols:
        return None
    first, last = begin // tile.cols, end // tile.cols
    return Box(tile.row + first, tile.col, last - first, tile.cols)


def stored_boxes(storage: Sequence[Tile]) -> dict[int, Box] | None:
    """Return the box that each rank stores of a matrix, or None if any rank's share is no box.

    Args:
        storage: the matrix's tiles.

    Returns:
        {rank: box}, by ascending rank, of the ranks that store a part of the matrix.
    """
    stored: dict[int, list[Box]] = {}
    for tile in storage:
        for rank, begin, end in tile.parts():
            box = _whole_rows(tile, begin, end)
            if box is None:
                return None
            stored.setdefault(rank, []).append(box)
    unions = {rank: union(boxes) for rank, boxes in sorted(stored.items())}
    box_of = {rank: box for rank, box in unions.items() if box is not None}
    return box_of if len(box_of) == len(unions) else None


@dataclass(frozen=True, slots=True)
class Ranges:
    """Each rank's [begin, end) of a matrix's rows or columns, computed from a cut when asked for.

    A sequence by rank that takes no memory per rank. It compares equal to a tuple of the same
    ranges, but does not hash as that tuple does.

    Attributes:
        cut: the cut; a rank that is no member of it has (0, 0).
        length: the number of rows or columns.
        ranks: the number of ranks.
        unit: the elements of the cut that make one row or column; a row or column that the cut
            divides belongs to the rank that has its last element.
    """

    cut: Cut
    length: int
    ranks: int
    unit: int = 1

    @classmethod
    def even(cls, length: int, ranks: int) -> Ranges:
        """Return ranges of nearly equal length: rank r's begins at length * r // ranks."""
        return cls(Cut.even(length, ranks), length, ranks, ranks)

    def __getitem__(self, rank: int) -> tuple[int, int]:
        begin, end = self.cut.run(rank)
        return begin // self.unit, min(end // self.unit, self.length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(self.__getitem__, range(self.ranks))

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end) for each rank's share of rows or columns [begin, end)."""
        for rank, first, last in self.cut.runs(begin * self.unit, end * self.unit):
            if first // self.unit < last // self.unit:
                yield rank, first // self.unit, last // self.unit

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranges):
            return tuple(self) == other
        same_size = (self.length, self.ranks, self.unit) == (other.length, other.ranks, other.unit)
        return same_size and self.cut == other.cut


@dataclass(frozen=True, slots=True)
class Slabs:
    """How a matrix is cut into slabs along its long side, one slab for each rank.

    Attributes:
        along: 0 for slabs of rows, 1 for slabs of columns.
        ranges: each rank's [begin, end) of the rows or columns.
        in_place: whether every rank stores its own slab already, so that nothing has to move.
    """

    along: int
    ranges: Ranges
    in_place: bool

    def box(self, rank: int, shape: tuple[int, int]) -> Box:
        """Return the rank's slab of a matrix of this shape."""
        return self._box(*self.ranges[rank], shape)

    def overlapping(
        self, tile: Tile, begin: int, end: int, shape: tuple[int, int]
    ) -> Iterator[tuple[int, Box]]:
        """Yield (rank, box) for each slab that may contain some of a tile's elements [begin, end).

        Args:
            tile: a row-major tile of the matrix.
            begin, end: elements of the tile.
            shape: of the whole matrix.

        Yields:
            A rank, and its slab's rows (or columns) that those elements span. The box may have
            elements outside the range: intersect it with the tile (``intersect``).
        """
        first, last = begin // tile.cols, -(-end // tile.cols)
        span = tile.row + first, tile.row + last
        if self.along:
            left = tile.col + begin % tile.cols
            one_row = last - first == 1
            span = (left, left + end - begin) if one_row else (tile.col, tile.col + tile.cols)
        for rank, start, stop in self.ranges.overlapping(*span) if begin < end else ():
            yield rank, self._box(start, stop, shape)

    def _box(self, begin: int, end: int, shape: tuple[int, int]) -> Box:
        if self.along:
            return Box(0, begin, shape[0], end - begin)
        return Box(begin, 0, end - begin, shape[1])


def slabs(layout: Layout, ranks: int, team: range | None = None) -> Slabs:
    """Return the slabs of a matrix: those it is stored in, else even ones, which must be exchanged.

    The long side of a square matrix is the one along which it is stored cut. Matrices of one shape
    that are cut alike share one cached result.

    Args:
        layout: where the matrix is stored.
        ranks: the number of ranks that share it.
        team: the ranks that work on it, in even slabs; None: all.
    """
    if team is not None:
        return even_slabs(layout.matrix.shape, ranks, team)
    return _slabs(layout.matrix.shape, layout.storage(), ranks)


@lru_cache(maxsize=4096)
def even_slabs(shape: tuple[int, int], ranks: int, team: range) -> Slabs:
    """Return the slabs of equal length (or nearly) of some ranks.

    Args:
        shape: of the matrix.
        ranks: the number of all ranks.
        team: those that have slabs.
    """
    length = max(shape)
    cut = Cut(range(0, len(team) * length + 1, length), team)
    return Slabs(int(shape[1] > shape[0]), Ranges(cut, length, ranks, len(team)), False)


@lru_cache(maxsize=4096)
def _slabs(shape: tuple[int, int], storage: tuple[Tile, ...], ranks: int) -> Slabs:
    boxes = stored_boxes(storage)
    for along in (0, 1):
        if boxes is None or shape[along] < shape[1 - along]:
            continue
        if all(box[3 - along] == shape[1 - along] for box in boxes.values()):
            ordered = sorted((box[along], rank) for rank, box in boxes.items())
            bounds = [*(begin for begin, _ in ordered), shape[along]]
            cut = Cut.compact(bounds, [rank for _, rank in ordered])
            return Slabs(along, Ranges(cut, shape[along], ranks), True)
    return Slabs(int(shape[1] > shape[0]), Ranges.even(max(shape), ranks), False)


def intersect(tile: Tile, begin: int, end: int, box: Box) -> Iterator[Box]:
    """Yield the boxes, at most three, that elements [begin, end) of a row-major tile fill in a box.

    In the order of the elements: the rest of a first row, whole rows, the start of a last row.

    Args:
        tile: the tile, whose elements are counted row by row.
        begin, end: elements of the tile.
        box: the rectangle of the matrix to which the elements are clipped.
    """
    first, last = begin // tile.cols, end // tile.cols
    strips: list[tuple[int, int, int, int]] = []  # rows and columns of the tile, [from, to)
    if begin % tile.cols:
        strips.append((first, first + 1, begin % tile.cols, tile.cols))
        first += 1
    if first > last:  # within one row
        strips = [(last, last + 1, begin % tile.cols, end % tile.cols)]
    else:
        strips.append((first, last, 0, tile.cols))
        strips.append((last, last + 1, 0, end % tile.cols))
    for top, bottom, left, right in strips:
        row, col = max(tile.row + top, box.row), max(tile.col + left, box.col)
        rows = min(tile.row + bottom, box.row + box.rows) - row
        cols = min(tile.col + right, box.col + box.cols) - col
        if rows > 0 and cols > 0:
            yield Box(row, col, rows, cols)


def parts_in(tile: Tile, box: Box) -> Iterator[tuple[int, int, int]]:
    """Yield ``tile.parts`` of the tile's rows that a box covers; none if no column is in the box.

    Yields:
        (rank, begin, end): the elements of the tile that the rank stores of those rows.
    """
    top, bottom = max(tile.row, box.row), min(tile.row + tile.rows, box.row + box.rows)
    left, right = max(tile.col, box.col), min(tile.col + tile.cols, box.col + box.cols)
    if top < bottom and left < right:
        yield from tile.parts((top - tile.row) * tile.cols, (bottom - tile.row) * tile.cols)


def block_layouts(layout: Layout) -> list[Layout]:
    """Return a layout for each block of a matrix, as if the block were a matrix named NAME@BLOCK.

    Blocks are what the tiles' ``block`` numbers say; if all tiles have one number, a block is what
    one rank stores. The blocks' matrices have no ``Matrix.blocks``, because a block need not be a
    run of whole rows of its parameter.

    Returns:
        One layout for each block, by ascending block number (or rank); the layout itself if there
        is one block.

    Raises:
        ValueError: a block is no rectangle.
    """
    tiles_by_block: dict[int, list[Tile]] = {}
    for tile in layout.tiles:
        tiles_by_block.setdefault(tile.block, []).append(tile)
    if len(tiles_by_block) == 1 and len(layout.holders()) > 1:
        if stored_boxes(layout.tiles) is None:
            raise ValueError(_not_rectangles(layout.matrix.name))
        tiles_by_block = {rank: _stored_tiles(layout, rank) for rank in layout.holders()}
    if len(tiles_by_block) == 1:
        return [layout]
    layouts = []
    for number, tiles in sorted(tiles_by_block.items()):
        block = union([Box(t.row, t.col, t.rows, t.cols) for t in tiles])
        if block is None:
            raise ValueError(_not_rectangles(layout.matrix.name))
        whole_matrix, shape = layout.matrix, (block.rows, block.cols)
        matrix = Matrix(f"{whole_matrix.name}@{number}", shape, (), whole_matrix.transposed)
        moved = [replace(t, row=t.row - block.row, col=t.col - block.col) for t in tiles]
        layouts.append(Layout(matrix, tuple(moved)))
    return layouts


def _stored_tiles(layout: Layout, rank: int) -> list[Tile]:
    """Return the tiles of a layout cut down to the whole rows that the rank stores of each."""
    tiles = []
    for tile in layout.tiles:
        box = stored_rows(tile, rank)
        if box is not None and box.rows:
            first = tile.position((box.row - tile.row) * tile.cols)
            tiles.append(replace(tile, row=box.row, rows=box.rows, offset=first))
    return tiles


def _not_rectangles(name: str) -> str:
    """Return the error for a matrix whose stored parts are no rectangles."""
    return (
        f"strategy is 'block', but the parts that ranks hold of {name} are no rectangles, so there"
        " are no blocks to orthogonalize alone (ZeRO cuts rows in two; gate and up as one matrix"
        " are two rectangles on each rank, so split them); or write strategy='owner'"
    )
