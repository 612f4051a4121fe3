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
from spectral_dist.sharding.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Cut:
    """A sequence of elements, and which run of it each rank stores.

    Attributes:
        bounds: member i stores elements [bounds[i], bounds[i + 1]); runs may differ in length and
            may be empty.
        members: the rank that each member is; None: member i is rank i.
    """

    bounds: Sequence[int]
    members: Sequence[int] | None = None

    @classmethod
    def even(cls, chunk: int, ranks: int) -> Cut:
        """Return a cut with ``chunk`` elements on every rank; it takes no memory per rank."""
        return cls(range(0, (ranks + 1) * chunk, chunk))

    @classmethod
    def compact(cls, bounds: Sequence[int], members: Sequence[int]) -> Cut:
        """Return a cut with its bounds and members as ranges where possible: no memory per rank.

        A last run that is shorter than the others is recorded as if it were as long, so nothing may
        depend on what lies behind the last element.
        """
        if len(bounds) > 2:
            padded = [*bounds[:-1], max(bounds[-1], 2 * bounds[-2] - bounds[-3])]
            as_range = _ranged(padded)
            bounds = as_range if isinstance(as_range, range) else bounds
        return cls(_ranged(bounds), _ranged(members))

    def holders(self, start: int, stop: int) -> Sequence[int]:
        """Return the ranks whose run meets [start, stop), and those of empty runs in between."""
        first = bisect_right(self.bounds, start) - 1
        last = bisect_left(self.bounds, stop)
        return range(first, last) if self.members is None else self.members[first:last]

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end) for each run's part of elements [start, stop), in order."""
        first = max(0, bisect_right(self.bounds, start) - 1)
        for i in range(first, bisect_left(self.bounds, stop)):
            begin, end = max(start, self.bounds[i]), min(stop, self.bounds[i + 1])
            if begin < end:
                yield (i if self.members is None else self.members[i]), begin, end

    def run(self, rank: int) -> tuple[int, int]:
        """Return [begin, end) of the rank's run; it is empty if the rank is no member."""
        if self.members is None:
            return self.bounds[rank], self.bounds[rank + 1]
        if rank not in self.members:
            return 0, 0
        i = self.members.index(rank)
        return self.bounds[i], self.bounds[i + 1]

    def describe(self) -> str:
        """Return a text that ranks can compare: equal exactly if their cuts are.

        It is under 200 characters whatever the number of ranks, as a hash if need be.
        """
        text = f"{_compact(self.bounds)} of {_compact(self.members)}"
        return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a matrix, and how its row-major elements are stored.

    Attributes:
        row, col: of its first element in the matrix.
        rows, cols: its size.
        cut: a sequence of elements, of which some are the tile's.
        offset: of the tile's first element in the cut's sequence.
        base: the element of a rank's local tensor at which its run of the cut begins.
        tensor: the index of that local tensor.
        block: which of the parts that tensor parallelism cuts the matrix into it belongs to.
        pitch: elements of the sequence from one row of the tile to the next; 0: the tile's elements
            follow one another.
        step: elements of the sequence from one of a row's to the next.
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
    pitch: int = 0
    step: int = 1

    @property
    def numel(self) -> int:
        """Return the number of elements of the tile."""
        return self.rows * self.cols

    def position(self, element: int) -> int:
        """Return where an element of the tile is in the cut's sequence."""
        if not self.pitch:
            return self.offset + element
        row, col = divmod(element, self.cols)
        return self.offset + row * self.pitch + col * self.step

    def _elements_before(self, position: int) -> int:
        """Return how many elements of the tile lie before a position of the cut's sequence."""
        if not self.pitch:
            return min(max(0, position - self.offset), self.numel)
        row, rest = divmod(max(0, position - self.offset), self.pitch)
        return min(row * self.cols + min(-(-rest // self.step), self.cols), self.numel)

    def holders(self) -> Sequence[int]:
        """Return the ranks that store a part of the tile, and others in between that do not."""
        return self.cut.holders(self.offset, self.position(self.numel - 1) + 1)

    def local(self, element: int, rank: int) -> int:
        """Return where an element that a rank stores is in the rank's local tensor."""
        return self.base + self.position(element) - self.cut.run(rank)[0]

    def part(self, rank: int) -> tuple[int, int]:
        """Return [begin, end) of the elements that a rank stores, counted from the tile's first.

        It is empty if the rank stores nothing of the tile.
        """
        first, last = self.cut.run(rank)
        begin = self._elements_before(first)
        return begin, max(begin, self._elements_before(last))

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end) for the part that each rank stores of elements [start, stop).

        Elements are counted from the tile's first; ``stop`` None means to its end. Ranks that
        store nothing of them are left out.
        """
        stop = self.numel if stop is None else stop
        if not self.pitch:
            for rank, begin, end in self.cut.runs(self.offset + start, self.offset + stop):
                yield rank, begin - self.offset, end - self.offset
        elif start < stop:
            runs = self.cut.runs(self.position(start), self.position(stop - 1) + 1)
            for rank, first, last in runs:
                begin, end = self._elements_before(first), self._elements_before(last)
                if begin < end:
                    yield rank, begin, end


@dataclass(frozen=True, slots=True)
class Layout:
    """For one matrix, every rank's shard; equal on all ranks of the group."""

    matrix: Matrix
    tiles: tuple[Tile, ...]

    def storage(self) -> tuple[Tile, ...]:
        """Return the tiles without their ``base``, ``tensor`` and ``block``.

        Matrices that are cut alike have equal storage, so it is the key of what is computed once
        for all of them.
        """
        return tuple(
            Tile(t.row, t.col, t.rows, t.cols, t.cut, t.offset, pitch=t.pitch, step=t.step)
            for t in self.tiles
        )

    def holders(self) -> Sequence[int]:
        """Return the ranks that store a part of the matrix, ascending."""
        return list(holders_of(self.storage()))

    def stacked(self) -> bool:
        """Return whether the tiles, one after the other, are the matrix's row-major elements."""
        row = 0
        for tile in self.tiles:
            if tile.row != row or tile.col or tile.cols != self.matrix.shape[1]:
                return False
            row += tile.rows
        return row == self.matrix.shape[0]

    def describe(self) -> str:
        """Return a line that ranks can compare: equal exactly if their layouts are."""
        tiles = [
            (t.row, t.col, t.rows, t.cols, t.offset, t.pitch, t.step, t.block, t.cut.describe())
            for t in self.tiles
        ]
        transposed = " transposed" * self.matrix.transposed
        return f"{self.matrix.name} {self.matrix.shape}{transposed} {tiles}"


@lru_cache(maxsize=4096)
def holders_of(storage: tuple[Tile, ...]) -> Sequence[int]:
    """Return the ranks that store a part of any tile, ascending; as a range where possible.

    Args:
        storage: ``Layout.storage()``.
    """
    return _ranged(sorted({rank for tile in storage for rank, _, _ in tile.parts()}))


@dataclass(frozen=True)
class Located:
    """Where those parameters of a parameter group live that are sharded alike.

    Attributes:
        layouts: of their matrices; equal on all ranks of ``group``.
        group: the ranks among which the layouts' matrices are cut; None if each is whole.
        device: where matrices are computed and collectives run.
        spans: (parameter name, tensor index, first element, number of elements) of what this rank
            stores of each parameter, to name it in an error.
        replicas: the ranks that store the same shards as this one; None if no other does. Each
            replica has its own ``group``, and all of them have the same layouts.
        replicate_momentum: whether every replica stores the momentum, and not the owner's only.
        tensors: the indices of the parameters in their parameter group; layouts and spans count
            these tensors from 0.
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
    """Return the layout of a matrix whose parameter is a part of one flat, sharded sequence.

    Args:
        matrix: the matrix in its parameter.
        cut: which rank stores which run of the sequence.
        offset: of the parameter's first element in the sequence.
        base: the element of this rank's local tensor at which its run of the sequence begins.
        tensor: the index of that local tensor.
    """
    tiles, row = [], 0
    for start, rows in matrix.blocks:
        for col, first, cols in matrix.column_runs(0, matrix.width):
            tiles.append(
                Tile(row, col, rows, cols, cut, offset + start + first, base, tensor,
                     **_pitch(matrix, matrix.width))
            )  # fmt: skip
        row += rows
    return Layout(matrix, tuple(tiles))


def _pitch(matrix: Matrix, width: int) -> dict[str, int]:
    """Return how elements of a matrix's tile are spaced in rows of ``width`` elements."""
    return {} if matrix.columns is None else {"pitch": width, "step": matrix.columns.step}


StackBox: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""What a rank stores of a parameter seen as (stack, rows, columns): [begin, end) of each."""


class StackBoxes(tuple[StackBox, ...]):
    """Each rank's box of a parameter; the hash is computed once, as many matrices are cut alike."""

    _hash: int

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash


def grid_layout(
    matrix: Matrix, stack: int, boxes: tuple[StackBox, ...], rank: int, tensor: int = 0
) -> Layout:
    """Return the layout of a matrix whose parameter is cut into one box for each rank.

    Args:
        matrix: the matrix in its parameter.
        stack: elements of each matrix of the parameter's stack (all of them for a 2-D parameter).
        boxes: by rank; together they are the parameter, without overlap, cut at the same rows and
            columns everywhere (a grid).
        rank: this rank.
        tensor: the index of its local tensor.
    """
    tiles, row = [], 0
    (first_layer, end_layer), (top, bottom), _ = boxes[rank]
    for start, rows in matrix.blocks:
        layer, first_row = start // stack, start % stack // matrix.width
        is_stored = first_layer <= layer < end_layer
        for left, right, cut in _strips(boxes, layer):
            width = right - left
            base = (layer - first_layer) * (bottom - top) * width if is_stored else 0
            for col, first, cols in matrix.column_runs(left, right):
                offset = first_row * width + first - left
                tiles.append(
                    Tile(row, col, rows, cols, cut, offset, base, tensor, **_pitch(matrix, width))
                )
        row += rows
    return Layout(matrix, tuple(tiles))


@lru_cache(maxsize=4096)
def _strips(boxes: tuple[StackBox, ...], layer: int) -> tuple[tuple[int, int, Cut], ...]:
    """Return the strips of columns into which boxes cut matrix ``layer`` of a stack.

    Returns:
        (first column, end column, how the strip's elements are cut) of each strip.
    """
    runs_by_columns: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for rank, (layers, rows, columns) in enumerate(boxes):
        if layers[0] <= layer < layers[1] and rows[0] < rows[1] and columns[0] < columns[1]:
            runs_by_columns.setdefault(columns, []).append((*rows, rank))
    strips = []
    for (left, right), runs in sorted(runs_by_columns.items()):
        runs.sort()
        width = right - left
        bounds = [*(top * width for top, _, _ in runs), runs[-1][1] * width]
        strips.append((left, right, Cut.compact(bounds, [rank for _, _, rank in runs])))
    return tuple(strips)


def _ranged(numbers: Sequence[int]) -> Sequence[int]:
    """Return the numbers as a range if they are one: constant memory, and a fast ``index``."""
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
