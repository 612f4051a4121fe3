"""Rectangles of a matrix: the slabs of ``gram``, the blocks of ``block``, what ranks hold of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from spectral_dist.sharding.layout import Layout, Matrix, Tile


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


def held(tile: Tile, rank: int) -> Box | None:
    """What the rank stores of a tile, if that is some whole rows of it."""
    begin, end = tile.part(rank)
    if begin % tile.cols or end % tile.cols:
        return None
    first, last = begin // tile.cols, end // tile.cols
    return Box(tile.row + first, tile.col, last - first, tile.cols)


def holdings(layout: Layout) -> dict[int, Box] | None:
    """The box that each holder stores of the matrix, if all store boxes."""
    found: dict[int, list[Box]] = {}
    for tile in layout.tiles:
        for rank in tile.holders():
            if tile.run(rank)[1]:
                box = held(tile, rank)
                if box is None:
                    return None
                found.setdefault(rank, []).append(box)
    together = {rank: union(boxes) for rank, boxes in sorted(found.items())}
    boxes_only = {rank: box for rank, box in together.items() if box is not None}
    return boxes_only if len(boxes_only) == len(together) else None


@dataclass(frozen=True, slots=True)
class Slabs:
    """A matrix cut along its long side: [begin, end) of it is rank r's, for each r of ``ranges``.

    along: 0 for slabs of rows, 1 for slabs of columns. still: every slab is where it is stored.
    """

    along: int
    ranges: tuple[tuple[int, int], ...]
    still: bool

    def box(self, rank: int, shape: tuple[int, int]) -> Box:
        """The rank's slab."""
        begin, end = self.ranges[rank]
        if self.along:
            return Box(0, begin, shape[0], end - begin)
        return Box(begin, 0, end - begin, shape[1])


def slabs(layout: Layout, ranks: int) -> Slabs:
    """As the matrix is stored, if that is in slabs; else even ones, which must move.

    The long side of a square matrix is the one along which it is cut.
    """
    m, n = shape = layout.matrix.shape
    found = holdings(layout)
    for along in (0, 1):
        if found is None or shape[along] < shape[1 - along]:
            continue
        if all(box[3 - along] == shape[1 - along] for box in found.values()):
            ranges = [(0, 0)] * ranks
            for rank, box in found.items():
                ranges[rank] = (box[along], box[along] + box[2 + along])
            return Slabs(along, tuple(ranges), True)
    along, long = int(n > m), max(m, n)
    even = tuple((long * r // ranks, long * (r + 1) // ranks) for r in range(ranks))
    return Slabs(along, even, False)


def meet(tile: Tile, begin: int, end: int, box: Box) -> Iterator[Box]:
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


def blocks(layout: Layout) -> list[Layout]:
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
        if holdings(layout) is None:
            raise ValueError(_no_tiles(layout.matrix.name))
        found = {rank: _rows_of(layout, rank) for rank in layout.holders()}
    if len(found) == 1:
        return [layout]
    result = []
    for number, tiles in sorted(found.items()):
        whole = union([Box(t.row, t.col, t.rows, t.cols) for t in tiles])
        if whole is None:
            raise ValueError(_no_tiles(layout.matrix.name))
        matrix = Matrix(f"{layout.matrix.name}@{number}", (whole.rows, whole.cols), ())
        moved = [replace(t, row=t.row - whole.row, col=t.col - whole.col) for t in tiles]
        result.append(Layout(matrix, tuple(moved)))
    return result


def _rows_of(layout: Layout, rank: int) -> list[Tile]:
    """Tiles of what the rank holds, which is whole rows of the layout's."""
    tiles = []
    for tile in layout.tiles:
        box = held(tile, rank)
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
