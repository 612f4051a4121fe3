"""Where one matrix lives: its tiles, and which rank stores which run of each. Metadata only."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from spectral_dist.sharding.collectives import Group


@dataclass(frozen=True, slots=True)
class Matrix:
    """A 2-D block that is orthogonalized as one unit, as it lies in its parameter.

    ``shape`` is (m, n), full and unsharded. ``blocks`` are the whole-row pieces it is made of, in
    order: (first element in the flattened parameter, number of rows). Most matrices have one.
    ``transposed``: whether it is stored in x out, and a rule is to see its transpose.
    """

    name: str
    shape: tuple[int, int]
    blocks: tuple[tuple[int, int], ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def read_shape(self) -> tuple[int, int]:
        """(out, in), as rules read it."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


@dataclass(frozen=True, slots=True)
class Cut:
    """A sequence of elements that its members store in consecutive runs.

    Member i stores [bounds[i], bounds[i + 1]) and is rank ``members[i]`` (rank i if members is
    None); runs may differ in length and may be empty.
    """

    bounds: Sequence[int]
    members: Sequence[int] | None = None

    @classmethod
    def even(cls, chunk: int, ranks: int) -> Cut:
        """Every rank stores ``chunk`` elements. A range: no memory per rank."""
        return cls(range(0, (ranks + 1) * chunk, chunk))

    @classmethod
    def compact(cls, bounds: Sequence[int], members: Sequence[int]) -> Cut:
        """Return the cut in ranges, where it can be: no memory per rank.

        So the last run may be said to be as long as the others, when it is shorter: nothing may
        depend on what is behind it.
        """
        if len(bounds) > 2:
            padded = [*bounds[:-1], max(bounds[-1], 2 * bounds[-2] - bounds[-3])]
            as_range = _ranged(padded)
            bounds = as_range if isinstance(as_range, range) else bounds
        return cls(_ranged(bounds), _ranged(members))

    def holders(self, start: int, stop: int) -> Sequence[int]:
        """Ranks whose run meets [start, stop). With empty runs inside, some may hold nothing."""
        first = bisect_right(self.bounds, start) - 1
        last = bisect_left(self.bounds, stop)
        return range(first, last) if self.members is None else self.members[first:last]

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end) of each run's part of [start, stop), in order, if it has one."""
        first = max(0, bisect_right(self.bounds, start) - 1)
        for i in range(first, bisect_left(self.bounds, stop)):
            begin, end = max(start, self.bounds[i]), min(stop, self.bounds[i + 1])
            if begin < end:
                yield (i if self.members is None else self.members[i]), begin, end

    def run(self, rank: int) -> tuple[int, int]:
        """[begin, end) of the rank's run; empty if it is no member."""
        if self.members is None:
            return self.bounds[rank], self.bounds[rank + 1]
        if rank not in self.members:
            return 0, 0
        i = self.members.index(rank)
        return self.bounds[i], self.bounds[i + 1]

    def describe(self) -> str:
        """The same on all ranks exactly when the cut is; short whatever the number of ranks."""
        text = f"{_compact(self.bounds)} of {_compact(self.members)}"
        return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a matrix, and how its row-major elements are stored.

    The tile's elements are [offset, offset + rows * cols) of the cut's sequence. A rank's run of
    the cut begins at element ``base`` of its local tensor number ``tensor``. ``block``: which of
    the parts that tensor parallelism cuts the matrix into it belongs to.
    """

    row: int
    col: int
    rows: int
    cols: int
    cut: Cut
    offset: int
    base: int = 0
    tensor: int = 0
    block: int = 0

    @property
    def numel(self) -> int:
        """Elements of the tile."""
        return self.rows * self.cols

    def holders(self) -> Sequence[int]:
        """Ranks that store a part of it."""
        return self.cut.holders(self.offset, self.offset + self.numel)

    def run(self, rank: int) -> tuple[int, int]:
        """(where it begins in the rank's tensor, its length) of the rank's run, length >= 0."""
        first, last = self.cut.run(rank)
        begin, end = max(self.offset, first), min(self.offset + self.numel, last)
        return self.base + begin - first, max(0, end - begin)

    def part(self, rank: int) -> tuple[int, int]:
        """[begin, end) of the rank's run among the tile's own elements; empty if it has none."""
        first, last = self.cut.run(rank)
        begin, end = max(self.offset, first), min(self.offset + self.numel, last)
        return begin - self.offset, max(begin, end) - self.offset

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end) as ``part`` has them of the ranks that have any.

        Of the tile's elements [start, stop) alone; None: to its end.
        """
        stop = self.numel if stop is None else stop
        for rank, begin, end in self.cut.runs(self.offset + start, self.offset + stop):
            yield rank, begin - self.offset, end - self.offset


@dataclass(frozen=True, slots=True)
class Layout:
    """For one matrix, every rank's shard; equal on all ranks of the group."""

    matrix: Matrix
    tiles: tuple[Tile, ...]

    def storage(self) -> tuple[Tile, ...]:
        """Return the tiles but for where in its own tensors a rank has them, and their blocks.

        Equal for matrices that are cut alike: what depends on nothing else is computed once.
        """
        return tuple(Tile(t.row, t.col, t.rows, t.cols, t.cut, t.offset) for t in self.tiles)

    def holders(self) -> Sequence[int]:
        """Ranks that store a part of the matrix, ascending."""
        return list(holders_of(self.storage()))

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
            (t.row, t.col, t.rows, t.cols, t.offset, t.block, t.cut.describe()) for t in self.tiles
        ]
        how = " transposed" * self.matrix.transposed
        return f"{self.matrix.name} {self.matrix.shape}{how} {tiles}"


@lru_cache(maxsize=4096)
def holders_of(storage: tuple[Tile, ...]) -> Sequence[int]:
    """Return the ranks that store a part of any of the tiles, ascending; a range if they are one.

    Args:
        storage: ``Layout.storage()``.
    """
    return _ranged(sorted({rank for tile in storage for rank, _, _ in tile.parts()}))


@dataclass(frozen=True)
class Located:
    """Where parameters of a group live that lie alike.

    Attributes:
        layouts: of their matrices; equal on all ranks of ``group``.
        group: the ranks among which the layouts' matrices are cut; None if each is whole.
        device: where matrices are computed and collectives run.
        spans: this rank's (parameter name, tensor number, first element, elements), to name a
            parameter in an error.
        replicas: the ranks that store the same shards as this one; None if no other does. Each
            replica has its own ``group``, and all of them have the same layouts.
        replicate_momentum: whether every replica keeps the momentum, and not the owner's alone.
        tensors: which of the group's tensors they are; layouts and spans count these from 0.
    """

    layouts: tuple[Layout, ...]
    group: Group
    device: torch.device
    spans: tuple[tuple[str, int, int, int], ...]
    replicas: Group = None
    replicate_momentum: bool = False
    tensors: tuple[int, ...] = ()


def flat_layout(
    matrix: Matrix, cut: Cut, *, offset: int = 0, base: int = 0, tensor: int = 0
) -> Layout:
    """The layout of a matrix whose whole parameter begins at ``offset`` of the cut's sequence."""
    tiles, row = [], 0
    for start, rows in matrix.blocks:
        tiles.append(Tile(row, 0, rows, matrix.shape[1], cut, offset + start, base, tensor))
        row += rows
    return Layout(matrix, tuple(tiles))


StackBox: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""What a rank stores of a (stack, rows, columns) parameter: [begin, end) of each."""


class StackBoxes(tuple[StackBox, ...]):
    """Boxes by rank, of which the hash is computed once: many matrices are cut by the same."""

    _hash: int

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash


def grid_layout(
    matrix: Matrix, stack: int, boxes: tuple[StackBox, ...], rank: int, tensor: int = 0
) -> Layout:
    """The layout of a matrix whose parameter each rank stores one box of.

    ``stack``: elements of each matrix of the parameter's stack (all of them for a 2-D parameter).
    ``boxes``: by rank; together they are the parameter, without overlap, cut at the same rows and
    columns everywhere (a grid). ``rank``: this one.
    """
    n, tiles, row = matrix.shape[1], [], 0
    (layer, layers), (top, bottom), _ = boxes[rank]
    for start, rows in matrix.blocks:
        number, first = start // stack, start % stack // n
        for left, right, cut in _strips(boxes, number):
            width = right - left
            before = (number - layer) * (bottom - top) * width if layer <= number < layers else 0
            tiles.append(Tile(row, left, rows, width, cut, first * width, before, tensor))
        row += rows
    return Layout(matrix, tuple(tiles))


@lru_cache(maxsize=4096)
def _strips(boxes: tuple[StackBox, ...], number: int) -> tuple[tuple[int, int, Cut], ...]:
    """(first column, last, how its rows are cut) of each strip of matrix ``number`` of a stack."""
    strips: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for rank, (layers, rows, columns) in enumerate(boxes):
        if layers[0] <= number < layers[1] and rows[0] < rows[1] and columns[0] < columns[1]:
            strips.setdefault(columns, []).append((*rows, rank))
    found = []
    for (left, right), runs in sorted(strips.items()):
        runs.sort()
        width = right - left
        bounds = [*(top * width for top, _, _ in runs), runs[-1][1] * width]
        found.append((left, right, Cut.compact(bounds, [rank for _, _, rank in runs])))
    return tuple(found)


def _ranged(numbers: Sequence[int]) -> Sequence[int]:
    """The numbers as a range if they are one: constant memory, and a fast ``index``."""
    if isinstance(numbers, range):
        return numbers
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step and numbers:
        as_range = range(numbers[0], numbers[0] + len(numbers) * step, step)
        if list(as_range) == list(numbers):
            return as_range
    return tuple(numbers)


def _compact(numbers: Sequence[int] | None) -> str:
    return str(numbers if numbers is None or isinstance(numbers, range) else tuple(numbers))
