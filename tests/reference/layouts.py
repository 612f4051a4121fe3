"""A framework that shards with slicing only, and says where things are; built alike on every rank.

Each ``Sequence`` holds values and, element by element, the rank that stores it. Both are cut by the
same slices, so a matrix's values, holders and expected directions never pass through the package.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TypeAlias

import torch
from torch import Tensor

from spectral_dist.sharding.layout import Cut, Layout, StackBox, Tile, flat_layout, grid_layout
from spectral_dist.sharding.matrix import Columns, Matrix

UNTOUCHED = -7.0
Part: TypeAlias = tuple[list[tuple[int, int]], Columns | None]
"""(first row, rows) of each block of rows of a matrix, and its columns."""


@dataclass
class Truth:
    """One matrix: all of it, who stores each element, and where its direction is written."""

    name: str
    whole: Tensor
    holders: Tensor
    targets: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(view of the output, what goes there as a view of ``direction``)"""
    direction: Tensor = field(default_factory=lambda: torch.empty(0))

    def held(self, rank: int) -> int:
        return int((self.holders == rank).sum())


@dataclass
class World:
    """What one rank knows, and what it must end up with."""

    layouts: list[Layout]
    truths: list[Truth]
    mine: list[Tensor]
    expected: Callable[[], list[Tensor]]


class Builder:
    """Adds parameters, then says what rank ``rank`` of ``ranks`` stores."""

    def __init__(self, rng: random.Random, ranks: int, rank: int, largest: int = 1 << 20) -> None:
        self.rng, self.ranks, self.rank, self.largest = rng, ranks, rank, largest
        self.layouts: list[Layout] = []
        self.truths: list[Truth] = []
        self.locals: list[list[tuple[Tensor, Tensor]]] = []  # (in, out) runs of each local tensor
        self.count = 0

    def new_values(self, numel: int) -> Tensor:
        """Numbers that all differ (up to ``largest``), exact in float32."""
        values = torch.arange(self.count, self.count + numel) % self.largest
        self.count += numel
        return values.float()

    def bounds(self, numel: int, members: list[int] | None = None) -> list[int]:
        """Uneven runs, some empty; of ranks that are no members, all."""
        members = list(range(self.ranks)) if members is None else members
        cuts = sorted(self.rng.choice([0, numel, *[self.rng.randint(0, numel)] * 5])
                      for _ in members[1:])  # fmt: skip
        ends = dict(zip(members, [*cuts, numel], strict=True))
        result = [0]
        for rank in range(self.ranks):
            result.append(ends.get(rank, result[-1]))
        return result

    def owners(self, bounds: list[int]) -> Tensor:
        runs = [torch.full((b - a,), r) for r, (a, b) in enumerate(pairwise(bounds))]
        return torch.cat(runs)

    def shapes(self) -> tuple[int, int]:
        return self.rng.choice([(2, 3), (4, 4), (3, 8), (1, 5), (7, 2), (5, 5), (6, 1)])

    def parts(self, rows: int, cols: int) -> list[Part]:
        """The rows and columns of each matrix of a parameter: one, or interleaved ones."""
        if rows % 2 == 0 and rows >= 4 and self.rng.random() < 0.6:
            half = rows // 2  # two groups of (q, k and v)
            q = self.rng.randint(1, half - 1)
            return [([(0, q), (half, q)], None), ([(q, half - q), (half + q, half - q)], None)]
        every = [(0, rows)]
        if cols > 2 and self.rng.random() < 0.4:  # side by side: one, the rest, and one
            runs = ((1, cols - 2),), ((0, 1), (cols - 1, 1))
            return [(every, Columns(cols, each)) for each in runs]
        if cols > 1 and self.rng.random() < 0.4:  # every second column
            counts = cols - cols // 2, cols // 2
            return [(every, Columns(cols, ((i, k),), 2)) for i, k in enumerate(counts)]
        return [(every, None)]

    def flat_buffer(self) -> None:
        """Stages 1 and 2: several parameters with gaps in one buffer, cut regardless of them."""
        shapes = [self.shapes() for _ in range(self.rng.randint(1, 5))]
        gaps = [self.rng.choice([0, 0, 3]) for _ in shapes]
        numel = sum(m * n + gap for (m, n), gap in zip(shapes, gaps, strict=True)) + 2
        even = self.rng.random() < 0.5
        if even:
            chunk = -(-numel // self.ranks)
            numel = chunk * self.ranks
            bounds, cut = list(range(0, numel + 1, chunk)), Cut.even(chunk, self.ranks)
        else:
            bounds = self.bounds(numel)
            cut = Cut(tuple(bounds))
        values, holders = self.new_values(numel), self.owners(bounds)
        out = torch.full((numel,), UNTOUCHED)
        tensor, base = self.add_local(values, out, bounds, before=self.rng.choice([0, 2]))
        offset = 0
        for (m, n), gap in zip(shapes, gaps, strict=True):
            offset += gap
            self.add_parameter((m, n), values, holders, out, cut, offset, base, tensor)
            offset += m * n

    def each_cut(self, whole_rows: bool) -> None:
        """Stage 3 and FSDP2: every parameter cut on its own; runs lie one after the other."""
        values_out_bounds = []
        base = 0
        tensor = len(self.locals)
        for _ in range(self.rng.randint(1, 4)):
            m, n = self.shapes()
            if whole_rows:
                chunk = -(-m // self.ranks)
                bounds = [min(m, r * chunk) * n for r in range(self.ranks + 1)]
            else:
                bounds = self.bounds(m * n)
            values, out = self.new_values(m * n), torch.full((m * n,), UNTOUCHED)
            holders, cut = self.owners(bounds), Cut(tuple(bounds))
            self.add_parameter((m, n), values, holders, out, cut, 0, base, tensor)
            values_out_bounds.append((values, out, bounds))
            base += bounds[self.rank + 1] - bounds[self.rank]
        self.locals.append(
            [(v[b[self.rank] : b[self.rank + 1]], o[b[self.rank] : b[self.rank + 1]])
             for v, o, b in values_out_bounds]
        )  # fmt: skip

    def tensor_parallel(self, parallel: int) -> None:
        """TP tiles by rows or columns; those of one TP rank flat in a buffer cut over its replicas.

        TP rank t is ranks t, t + parallel, t + 2 parallel, ...
        """
        shapes = [
            (self.rng.randint(2, 4) * parallel, self.rng.randint(2, 3) * parallel)
            for _ in range(self.rng.randint(1, 6))
        ]
        if self.rng.random() < 0.6:  # of one shape, but not tiled alike: not one batch
            shapes = shapes[:1] * len(shapes)
        by_rows = [self.rng.random() < 0.5 for _ in shapes]
        wholes = [self.new_values(m * n).view(m, n) for m, n in shapes]
        holders = [torch.full(shape, -1) for shape in shapes]
        outs = [torch.full(shape, UNTOUCHED) for shape in shapes]
        edges = [
            sorted(
                [0, m if rows else n, *self.rng.sample(range(1, m if rows else n), parallel - 1)]
            )
            for (m, n), rows in zip(shapes, by_rows, strict=True)
        ]  # uneven tiles
        tiles: list[list[Tile]] = [[] for _ in shapes]
        tensor = len(self.locals)
        mine: list[tuple[Tensor, Tensor]] = []
        buffers = []
        for t in range(parallel):
            boxes = [
                (slice(a[t], a[t + 1]), slice(None))
                if rows
                else (slice(None), slice(a[t], a[t + 1]))
                for a, rows in zip(edges, by_rows, strict=True)
            ]
            cat = torch.cat([w[box].flatten() for w, box in zip(wholes, boxes, strict=True)])
            bounds = self.bounds(len(cat), list(range(t, self.ranks, parallel)))
            stored_by = self.owners(bounds)
            out = torch.full((len(cat),), UNTOUCHED)
            offset = 0
            for i, (w, box) in enumerate(zip(wholes, boxes, strict=True)):
                rows, cols = w[box].shape
                run = slice(offset, offset + rows * cols)
                holders[i][box] = stored_by[run].view(rows, cols)
                row, col = (edges[i][t], 0) if by_rows[i] else (0, edges[i][t])
                cut = Cut(tuple(bounds))
                tiles[i].append(Tile(row, col, rows, cols, cut, offset, 0, tensor))
                offset += rows * cols
            if self.rank % parallel == t:
                run = slice(bounds[self.rank], bounds[self.rank + 1])
                mine.append((cat[run], out[run]))
            buffers.append((out, boxes))
        for i, (m, n) in enumerate(shapes):
            truth = Truth(f"tp{len(self.truths)}", wholes[i], holders[i])
            truth.direction = outs[i]
            self.truths.append(truth)
            self.rng.shuffle(tiles[i])
            matrix = Matrix(truth.name, (m, n), ((0, m),))
            self.layouts.append(Layout(matrix, tuple(tiles[i])))
        first = len(self.truths) - len(shapes)
        for out, boxes in buffers:
            offset = 0
            for i, box in enumerate(boxes):
                view = self.truths[first + i].direction[box]
                target = out[offset : offset + view.numel()].view(view.shape)
                self.truths[first + i].targets.append((target, view))
                offset += view.numel()
        self.locals.append(mine)

    def boxes(self) -> None:
        """DTensors: each rank stores one box of a (stack of) matrices, on a grid of ranks.

        Which rank is where on the grid is any order: FSDP over tensor parallelism interleaves.
        """
        layers = self.rng.choice([1, 1, 2, 3, 5])
        m, n = self.shapes()
        grid = self.grid()
        order = self.rng.sample(range(self.ranks), self.ranks)
        if self.rng.random() < 0.4:
            order.sort()
        edges = [self.edges(size, parts) for size, parts in zip((layers, m, n), grid, strict=True)]
        places = dict(zip(order, product(*map(range, grid)), strict=True))
        found: list[StackBox] = []
        for rank in range(self.ranks):
            begin_end = [(e[i], e[i + 1]) for e, i in zip(edges, places[rank], strict=True)]
            found.append((begin_end[0], begin_end[1], begin_end[2]))
        self.add_boxes((layers, m, n), tuple(found))

    def grid(self) -> tuple[int, int, int]:
        """Ranks along (stack, rows, columns)."""
        every = [
            (a, b, self.ranks // (a * b))
            for a, b in product(range(1, self.ranks + 1), repeat=2)
            if self.ranks % (a * b) == 0
        ]
        return self.rng.choice(every)

    def edges(self, size: int, parts: int) -> list[int]:
        """Where an axis is cut: as torch.chunk does, or anywhere; parts may be empty."""
        if self.rng.random() < 0.5:
            chunk = -(-size // parts)
            return [min(size, i * chunk) for i in range(parts + 1)]
        return [0, *sorted(self.rng.randint(0, size) for _ in range(parts - 1)), size]

    def add_boxes(self, shape: tuple[int, int, int], boxes: tuple[StackBox, ...]) -> None:
        layers, m, n = shape
        values = self.new_values(layers * m * n).view(shape)
        out, holders = torch.full(shape, UNTOUCHED), torch.full(shape, -1)
        for rank, box in enumerate(boxes):
            holders[_slices(box)] = rank
        tensor = len(self.locals)
        mine = _slices(boxes[self.rank])
        self.locals.append([(values[mine], out[mine])])
        for k, part in ((k, p) for k in range(layers) for p in self.parts(m, n)):
            blocks = tuple((k * m * n + first * n, count) for first, count in part[0])
            matrix = self.add_truth(values[k], holders[k], out[k], part, blocks)
            self.layouts.append(grid_layout(matrix, m * n, boxes, self.rank, tensor))

    def add_local(
        self, values: Tensor, out: Tensor, bounds: list[int], before: int
    ) -> tuple[int, int]:
        run = slice(bounds[self.rank], bounds[self.rank + 1])
        padding = torch.full((before,), UNTOUCHED)
        self.locals.append([(padding, padding), (values[run], out[run])])
        return len(self.locals) - 1, before

    def add_parameter(
        self,
        shape: tuple[int, int],
        values: Tensor,
        holders: Tensor,
        out: Tensor,
        cut: Cut,
        offset: int,
        base: int,
        tensor: int,
    ) -> None:
        m, n = shape
        run = slice(offset, offset + m * n)
        value, holder, target = (x[run].view(m, n) for x in (values, holders, out))
        for part in self.parts(m, n):
            blocks = tuple((first * n, count) for first, count in part[0])
            matrix = self.add_truth(value, holder, target, part, blocks)
            self.layouts.append(flat_layout(matrix, cut, offset=offset, base=base, tensor=tensor))

    def add_truth(
        self,
        value: Tensor,
        holder: Tensor,
        target: Tensor,
        part: Part,
        blocks: tuple[tuple[int, int], ...],
    ) -> Matrix:
        """A matrix of some rows and columns of 2-D tensors."""
        rows = [row for first, count in part[0] for row in range(first, first + count)]
        columns = part[1] or Columns(value.shape[1], ((0, value.shape[1]),))
        cols = [first + columns.step * k for first, count in columns.runs for k in range(count)]
        truth = Truth(f"w{len(self.truths)}", value[rows][:, cols], holder[rows][:, cols])
        truth.direction = torch.full((len(rows), len(cols)), UNTOUCHED)
        truth.targets = [
            (target[row, col : col + 1], truth.direction[i, j : j + 1])
            for i, row in enumerate(rows)
            for j, col in enumerate(cols)
        ]
        self.truths.append(truth)
        return Matrix(truth.name, (len(rows), len(cols)), blocks, columns=part[1])

    def finish(self) -> World:
        mine = [torch.cat([v.reshape(-1) for v, _ in local]) for local in self.locals]

        def expected() -> list[Tensor]:
            for truth in self.truths:
                for target, view in truth.targets:
                    target.copy_(view)
            return [torch.cat([out.reshape(-1) for _, out in local]) for local in self.locals]

        return World(self.layouts, self.truths, mine, expected)


def _slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(begin, end) for begin, end in box)


def random_world(seed: int, ranks: int, rank: int, *, largest: int) -> World:
    """Of every kind of sharding some, over ``ranks``; with one rank all is whole there."""
    rng = random.Random(seed)
    builder = Builder(rng, ranks, rank, largest)
    kinds: list[Callable[[], None]] = [
        builder.flat_buffer,
        lambda: builder.each_cut(whole_rows=False),
        lambda: builder.each_cut(whole_rows=True),
        builder.boxes,
        builder.boxes,
    ]
    if ranks > 1:
        kinds += [lambda t=t: builder.tensor_parallel(t) for t in range(2, ranks + 1)]
    for kind in rng.sample(kinds, rng.randint(1, len(kinds))):
        kind()
    return builder.finish()
