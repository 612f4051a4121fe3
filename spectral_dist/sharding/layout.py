"""Where one matrix lives: its tiles, and which rank stores which run of each. Metadata only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spectral_dist.sharding.collectives import Group


@dataclass(frozen=True, slots=True)
class Matrix:
    """A 2-D block that is orthogonalized as one unit, as it lies in its parameter.

    ``shape`` is (m, n), full and unsharded. ``blocks`` are the whole-row pieces it is made of, in
    order: (first element in the flattened parameter, number of rows). Most matrices have one.
    """

    name: str
    shape: tuple[int, int]
    blocks: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Cut:
    """A sequence of elements that consecutive ranks store in consecutive runs.

    Rank r stores [bounds[r], bounds[r + 1]); runs may differ in length and may be empty.
    """

    bounds: Sequence[int]

    @classmethod
    def even(cls, chunk: int, ranks: int) -> Cut:
        """Every rank stores ``chunk`` elements. A range: no memory per rank."""
        return cls(range(0, (ranks + 1) * chunk, chunk))

    def holders(self, start: int, stop: int) -> range:
        """Ranks whose run meets [start, stop). With empty runs inside, some may hold nothing."""
        first = bisect_right(self.bounds, start) - 1
        return range(first, bisect_left(self.bounds, stop))


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a matrix, and how its row-major elements are stored.

    The tile's elements are [offset, offset + rows * cols) of the cut's sequence. A rank's run of
    the cut begins at element ``base`` of its local tensor number ``tensor``.
    """

    row: int
    col: int
    rows: int
    cols: int
    cut: Cut
    offset: int
    base: int = 0
    tensor: int = 0

    @property
    def numel(self) -> int:
        """Elements of the tile."""
        return self.rows * self.cols

    def holders(self) -> range:
        """Ranks that store a part of it."""
        return self.cut.holders(self.offset, self.offset + self.numel)

    def run(self, rank: int) -> tuple[int, int]:
        """(where it begins in the rank's tensor, its length) of the rank's run, length >= 0."""
        begin = max(self.offset, self.cut.bounds[rank])
        end = min(self.offset + self.numel, self.cut.bounds[rank + 1])
        return self.base + begin - self.cut.bounds[rank], max(0, end - begin)


@dataclass(frozen=True, slots=True)
class Layout:
    """For one matrix, every rank's shard; equal on all ranks.

    ``replicated``: every rank of the group stores all of it, and the tiles' cut has one run.
    """

    matrix: Matrix
    tiles: tuple[Tile, ...]
    replicated: bool = False

    def holders(self) -> Sequence[int]:
        """Ranks that store a part of the matrix, ascending. Not for replicated layouts."""
        if len(self.tiles) == 1:
            tile = self.tiles[0]
            return [r for r in tile.holders() if tile.run(r)[1]]
        return sorted({r for tile in self.tiles for r in tile.holders() if tile.run(r)[1]})

    def stacked(self) -> bool:
        """Whether the tiles, one after the other, are the matrix's row-major elements."""
        row = 0
        for tile in self.tiles:
            if tile.row != row or tile.col or tile.cols != self.matrix.shape[1]:
                return False
            row += tile.rows
        return row == self.matrix.shape[0]

    def describe(self) -> str:
        """One line that is the same on all ranks exactly when the layout is."""
        tiles = [
            (t.row, t.col, t.rows, t.cols, t.offset, tuple_or_range(t.cut)) for t in self.tiles
        ]
        return f"{self.matrix.name} {self.matrix.shape} replicated={self.replicated} {tiles}"


@dataclass(frozen=True)
class Placement:
    """Where the parameters of one ``step`` call live.

    ``spans`` are this rank's (parameter name, tensor number, first element, elements), to name a
    parameter in an error.
    """

    layouts: tuple[Layout, ...]
    group: Group
    device: torch.device
    spans: tuple[tuple[str, int, int, int], ...]


def tuple_or_range(cut: Cut) -> str:
    """The cut's bounds as text: short for an even cut whatever the number of ranks."""
    return str(cut.bounds if isinstance(cut.bounds, range) else tuple(cut.bounds))


def lay(
    matrix: Matrix,
    cut: Cut,
    *,
    offset: int = 0,
    base: int = 0,
    tensor: int = 0,
    replicated: bool = False,
) -> Layout:
    """The layout of a matrix whose whole parameter begins at ``offset`` of the cut's sequence.

    A replicated parameter is a cut of one run: [0, elements of the parameter).
    """
    tiles, row = [], 0
    for start, rows in matrix.blocks:
        tiles.append(Tile(row, 0, rows, matrix.shape[1], cut, offset + start, base, tensor))
        row += rows
    return Layout(matrix, tuple(tiles), replicated)
