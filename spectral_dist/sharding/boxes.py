"""Rectangles of a matrix: the slabs of ``gram``, the blocks of ``block``, what ranks hold of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from spectral_dist.sharding.layout import Cut, Layout, Matrix, Tile


class Box(NamedTuple):
    """Rows [row, row + rows) and columns [col, col + cols) of a matrix."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.rows * self.cols


def union(boxes: Sequence[Box]) -> Box | None:
    """What disjoint boxes are together, if that is a box."""
    row, col = min(b.row for b in boxes), min(b.col for b in boxes)
    bottom, right = max(b.row + b.rows for b in boxes), max(b.col + b.cols for b in boxes)
    whole = Box(row, col, bottom - row, right - col)
    return whole if whole.numel == sum(b.numel for b in boxes) else None


def stored_rows(tile: Tile, rank: int) -> Box | None:
    """What the rank stores of a tile, if that is some whole rows of it."""
    return _rows(tile, *tile.part(rank))


def _rows(tile: Tile, begin: int, end: int) -> Box | None:
    """Elements [begin, end) of a tile as a box, if they are some whole rows of it."""
    if begin % tile.cols or end % tile.cols:
        return None
    first, last = begin // tile.cols, end // tile.cols
    return Box(tile.row + first, tile.col, last - first, tile.cols)


def stored_boxes(storage: Sequence[Tile]) -> dict[int, Box] | None:
    """The box that each holder stores of a matrix of these tiles, if all store boxes."""
    stored: dict[int, list[Box]] = {}
    for tile in storage:
        for rank, begin, end in tile.parts():
            box = _rows(tile, begin, end)
            if box is None:
                return None
            stored.setdefault(rank, []).append(box)
    together = {rank: union(boxes) for rank, boxes in sorted(stored.items())}
    boxes_only = {rank: box for rank, box in together.items() if box is not None}
    return boxes_only if len(boxes_only) == len(together) else None


@dataclass(frozen=True, slots=True)
class Ranges:
    """Of each rank, its [begin, end) of ``length`` rows or columns, as a cut has it: no list of it.

    ``unit`` elements of the cut are one row or column; one that is cut goes to who has its end. Who
    is no member of the cut has (0, 0). Compares with a tuple of the same, but does not hash as one.
    """

    cut: Cut
    length: int
    ranks: int
    unit: int = 1

    @classmethod
    def even(cls, length: int, ranks: int) -> Ranges:
        """Return those of which rank r's begins at length * r // ranks."""
        return cls(Cut.even(length, ranks), length, ranks, ranks)

    def __getitem__(self, rank: int) -> tuple[int, int]:
        begin, end = self.cut.run(rank)
        return begin // self.unit, min(end // self.unit, self.length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(self.__getitem__, range(self.ranks))

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end) of what each rank has of [begin, end), if it has anything."""
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
    """A matrix cut along its long side: [begin, end) of it is rank r's, for each r of ``ranges``.

    along: 0 for slabs of rows, 1 for slabs of columns. still: every slab is where it is stored.
    """

    along: int
    ranges: Ranges
    still: bool

    def box(self, rank: int, shape: tuple[int, int]) -> Box:
        """The rank's slab."""
        return self._box(*self.ranges[rank], shape)

    def overlapping(
        self, tile: Tile, begin: int, end: int, shape: tuple[int, int]
    ) -> Iterator[tuple[int, Box]]:
        """Yield each rank whose slab may have some of elements [begin, end) of a tile, and it.

        Of the slab, no more than the rows or columns in which they are.
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


def slabs(layout: Layout, ranks: int) -> Slabs:
    """As the matrix is stored, if that is in slabs; else even ones, which must move.

    The long side of a square matrix is the one along which it is cut. Computed once for all
    matrices of one shape that are cut alike.
    """
    return _slabs(layout.matrix.shape, layout.storage(), ranks)


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
    """Elements [begin, end) of a row-major tile that are in ``box``: up to three boxes, in order.

    The rest of a first row, whole rows, and the start of a last one.
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
    """``tile.parts`` of the rows of a tile that are in a box, if any of its columns is."""
    top, bottom = max(tile.row, box.row), min(tile.row + tile.rows, box.row + box.rows)
    left, right = max(tile.col, box.col), min(tile.col + tile.cols, box.col + box.cols)
    if top < bottom and left < right:
        yield from tile.parts((top - tile.row) * tile.cols, (bottom - tile.row) * tile.cols)


def tiles_alone(layout: Layout) -> list[Layout]:
    """The layouts of the matrix's blocks, each a matrix of its own, named NAME@BLOCK.

    Blocks are as the tiles say; where they say nothing, what each rank holds. They have no
    ``Matrix.blocks``: a block is no run of whole rows of its parameter.

    Raises:
        ValueError: a block that is no rectangle.
    """
    found: dict[int, list[Tile]] = {}
    for tile in layout.tiles:
        found.setdefault(tile.block, []).append(tile)
    if len(found) == 1 and len(layout.holders()) > 1:
        if stored_boxes(layout.tiles) is None:
            raise ValueError(_no_tiles(layout.matrix.name))
        found = {rank: _rows_of(layout, rank) for rank in layout.holders()}
    if len(found) == 1:
        return [layout]
    result = []
    for number, tiles in sorted(found.items()):
        whole = union([Box(t.row, t.col, t.rows, t.cols) for t in tiles])
        if whole is None:
            raise ValueError(_no_tiles(layout.matrix.name))
        whole_matrix, shape = layout.matrix, (whole.rows, whole.cols)
        matrix = Matrix(f"{whole_matrix.name}@{number}", shape, (), whole_matrix.transposed)
        moved = [replace(t, row=t.row - whole.row, col=t.col - whole.col) for t in tiles]
        result.append(Layout(matrix, tuple(moved)))
    return result


def _rows_of(layout: Layout, rank: int) -> list[Tile]:
    """Tiles of what the rank holds, which is whole rows of the layout's."""
    tiles = []
    for tile in layout.tiles:
        box = stored_rows(tile, rank)
        if box is not None and box.rows:
            skipped = (box.row - tile.row) * tile.cols
            tiles.append(replace(tile, row=box.row, rows=box.rows, offset=tile.offset + skipped))
    return tiles


def _no_tiles(name: str) -> str:
    return (
        f"strategy is 'block', but the parts that ranks hold of {name} are no rectangles, so there"
        " are no blocks to orthogonalize alone (ZeRO cuts rows in two; gate and up as one matrix"
        " are two rectangles on each rank, so split them); or write strategy='owner'"
    )
