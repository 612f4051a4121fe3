"""Cuts, tiles and layouts against their definitions, element by element."""

from __future__ import annotations

import time
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.sharding.bucket_routes import tile_pieces
from spectral_dist.sharding.layout import Cut, Layout, Tile, flat_layout, grid_layout
from spectral_dist.sharding.matrix import Columns, Matrix
from tests.support.tiles import length_of, run_of

quick = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def cuts(draw, least=1):
    """A cut of at least ``least`` elements and its lengths: even, uneven, with empty runs."""
    if draw(st.booleans()):
        ranks = draw(st.integers(1, 6))
        chunk = draw(st.integers(max(1, -(-least // ranks)), least + 5))
        return Cut.even(chunk, ranks), [chunk] * ranks
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 7]), min_size=0, max_size=5))
    lengths.insert(draw(st.integers(0, len(lengths))), max(0, least - sum(lengths)))
    bounds = [sum(lengths[:r]) for r in range(len(lengths) + 1)]
    return Cut(tuple(bounds)), lengths


@st.composite
def member_cuts(draw, least=1):
    """A cut of some of the ranks in any order, and (rank, length) of its runs in theirs."""
    _, lengths = draw(cuts(least))
    ranks = draw(st.integers(len(lengths), len(lengths) + 3))
    members = draw(st.permutations(range(ranks)))[: len(lengths)]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    kind = tuple
    if draw(st.booleans()):  # a range, as of the ranks of one column of a mesh
        step = draw(st.integers(1, 3))
        first = draw(st.integers(0, 2))
        members = range(first, first + step * len(lengths), step)
        ranks = max(members) + 1
        kind = range if draw(st.booleans()) else tuple
    members = members if kind is range else tuple(members)
    return Cut(tuple(bounds), members), list(zip(members, lengths, strict=True)), ranks


@st.composite
def tiles(draw):
    rows, cols, offset = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 9)),
    )
    cut, lengths = draw(cuts(offset + rows * cols))
    base = draw(st.integers(0, 4))
    return Tile(0, 0, rows, cols, cut, offset, base, draw(st.integers(0, 2))), lengths


def storage(tile, lengths):
    """rank -> {element of the tile: where it lies in the rank's tensor}, from the definition."""
    stored = {}
    element = 0
    for rank, length in enumerate(lengths):
        for k in range(length):
            if tile.offset <= element < tile.offset + tile.rows * tile.cols:
                stored.setdefault(rank, {})[element - tile.offset] = tile.base + k
            element += 1
    return stored


@quick
@given(tiles())
def test_runs_partition_the_tile(drawn):
    tile, lengths = drawn
    stored = storage(tile, lengths)
    assert sum(map(len, stored.values())) == tile.numel
    for rank in range(len(lengths)):
        start, length = run_of(tile, rank)
        wanted = [stored.get(rank, {})[e] for e in sorted(stored.get(rank, {}))]
        assert length == len(wanted)
        assert not length or list(range(start, start + length)) == wanted


@quick
@given(tiles())
def test_holders_are_exactly_the_ranks_with_something(drawn):
    tile, lengths = drawn
    holders = sorted(storage(tile, lengths))
    layout = Layout(Matrix("w", (tile.rows, tile.cols), ((0, tile.rows),)), (tile,))
    assert list(layout.holders()) == holders
    # a tile's own answer may hold empty runs between the first and the last
    assert set(holders) <= set(tile.holders())
    assert (tile.holders()[0], tile.holders()[-1]) == (holders[0], holders[-1])


@quick
@given(st.lists(tiles(), min_size=1, max_size=4))
def test_holders_of_several_tiles(drawn):
    holders = sorted({rank for tile, lengths in drawn for rank in storage(tile, lengths)})
    layout = Layout(Matrix("w", (1, 1), ((0, 1),)), tuple(tile for tile, _ in drawn))
    assert list(layout.holders()) == holders


@quick
@given(st.integers(1, 50), st.integers(1, 9), st.data())
def test_an_even_cut_is_the_uneven_one_of_equal_lengths(chunk, ranks, data):
    even, uneven = (
        Cut.even(chunk, ranks),
        Cut(tuple(chunk * r for r in range(ranks + 1))),
    )
    start = data.draw(st.integers(0, chunk * ranks - 1))
    stop = data.draw(st.integers(start + 1, chunk * ranks))
    assert list(even.bounds) == list(uneven.bounds)
    assert even.holders(start, stop) == uneven.holders(start, stop)


def test_an_even_cut_costs_no_memory_per_rank():
    assert isinstance(Cut.even(10**9, 10**6).bounds, range)
    assert len(Layout(Matrix("w", (4, 4), ((0, 4),)), ()).describe()) < 100
    layout = flat_layout(Matrix("w", (4, 4), ((0, 4),)), Cut.even(16, 10**6))
    assert len(layout.describe()) < 200


def test_lay_places_every_block_where_it_lies():
    # q, k, v of two groups: [q q k v q q k v] rows of 3, at element 10 of the sequence
    weight = torch.arange(10, 34).view(8, 3)
    wanted = {"q": weight[[0, 1, 4, 5]], "k": weight[[2, 6]], "v": weight[[3, 7]]}
    blocks = {"q": ((0, 2), (12, 2)), "k": ((6, 1), (18, 1)), "v": ((9, 1), (21, 1))}
    cut = Cut.even(20, 2)
    for name, rows in wanted.items():
        matrix = Matrix(name, tuple(rows.shape), blocks[name])
        assert matrix.numel == rows.numel()
        layout = flat_layout(matrix, cut, offset=10, base=5, tensor=3)
        found = []
        for tile in layout.tiles:
            assert (tile.col, tile.cols, tile.base, tile.tensor) == (0, 3, 5, 3)
            assert tile.row == len(found) // 3
            found += range(tile.offset, tile.offset + tile.numel)
        assert found == rows.flatten().tolist()
        assert layout.stacked()


@quick
@given(st.data())
def test_stacked_tiles_are_the_row_major_elements(data):
    m, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    by_rows = data.draw(st.booleans())
    side = m if by_rows else n
    edges = sorted({0, side, *data.draw(st.lists(st.integers(0, side), max_size=3))})
    boxes = list(pairwise(edges))
    boxes = data.draw(st.permutations(boxes))
    whole = torch.arange(m * n).view(m, n)
    cut = Cut((0, m * n))
    placed, elements = [], []
    for a, b in boxes:
        row, col, rows, cols = (a, 0, b - a, n) if by_rows else (0, a, m, b - a)
        placed.append(Tile(row, col, rows, cols, cut, 0))
        elements += whole[row : row + rows, col : col + cols].flatten().tolist()
    stacked = Layout(Matrix("w", (m, n), ((0, m),)), tuple(placed)).stacked()
    if stacked or by_rows:  # a single row in column tiles may be called either
        assert stacked == (elements == list(range(m * n)))
    elif m > 1 and len(boxes) > 1:
        assert not stacked


def test_an_incomplete_stack_is_none():
    tile = Tile(0, 0, 2, 3, Cut((0, 12)), 0)
    assert not Layout(Matrix("w", (4, 3), ((0, 4),)), (tile,)).stacked()


def test_description_tells_layouts_apart():
    cut = Cut((0, 5, 24))
    base = {"name": "w", "shape": (4, 6), "blocks": ((0, 4),), "cut": cut, "offset": 0}

    def line(**changes):
        o = {**base, **changes}
        matrix = Matrix(o["name"], o["shape"], o["blocks"])
        return flat_layout(matrix, o["cut"], offset=o["offset"]).describe()

    lines = [
        line(),
        line(name="v"),
        line(shape=(6, 4), blocks=((0, 6),)),
        line(blocks=((0, 2), (12, 2))),
        line(cut=Cut((0, 6, 24))),
        line(cut=Cut((0, 5, 24, 24))),
        line(cut=Cut.even(12, 2)),
        line(offset=1),
        line(cut=Cut((0, 5, 24), (1, 0))),
        line(cut=Cut((0, 5, 24), (0, 2))),
    ]
    assert len(set(lines)) == len(lines)
    assert line() == line()
    # where a run lies in a rank's own tensor is that rank's business
    matrix = Matrix("w", (4, 6), ((0, 4),))
    assert flat_layout(matrix, cut, base=7, tensor=2).describe() == line()


@quick
@given(member_cuts(), st.data())
def test_members_store_their_runs_and_others_nothing(drawn, data):
    cut, runs, ranks = drawn
    stored, element = {}, 0
    for rank, length in runs:
        stored[rank] = list(range(element, element + length))
        element += length
    for rank in range(ranks):
        assert list(range(*cut.run(rank))) == stored.get(rank, [])
    start = data.draw(st.integers(0, element - 1))
    stop = data.draw(st.integers(start + 1, element))
    found = list(cut.holders(start, stop))
    wanted = [r for r, own in stored.items() if set(own) & set(range(start, stop))]
    assert len(set(found)) == len(found)
    assert [r for r in found if r in wanted] == wanted  # and between them those with empty runs
    assert {found[0], found[-1]} <= set(wanted)
    tile = Tile(0, 0, 1, stop - start, cut, start, base=3)
    layout = Layout(Matrix("w", (1, stop - start), ((0, 1),)), (tile,))
    assert sorted(layout.holders()) == sorted(wanted)
    for rank in range(ranks):
        begin, length = run_of(tile, rank)
        mine = [e for e in stored.get(rank, []) if start <= e < stop]
        assert length == len(mine)
        assert not mine or begin == 3 + stored[rank].index(mine[0])


@quick
@given(st.lists(member_cuts(), min_size=2, max_size=6))
def test_descriptions_are_equal_exactly_for_equal_cuts(drawn):
    for (one, _, _), (other, _, _) in product(drawn, drawn):
        equal = (list(one.bounds), list(one.members)) == (list(other.bounds), list(other.members))
        # a range and a tuple of the same numbers may be told apart: all ranks build them alike
        if one.describe() == other.describe():
            assert equal
        elif equal:
            assert type(one.bounds) is not type(other.bounds) or type(one.members) is not type(
                other.members
            )


def test_descriptions_stay_short_for_thousands_of_ranks():
    ranks = 4096
    bounds = tuple(r * r for r in range(ranks + 1))
    members = tuple((r * 5) % ranks for r in range(ranks))
    found = [Cut(bounds), Cut(bounds, members), Cut(bounds, members[::-1]), Cut((1, *bounds[1:])),
             Cut(bounds, range(ranks))]  # fmt: skip
    lines = [cut.describe() for cut in found]
    assert len(set(lines)) == len(lines)
    assert max(map(len, lines)) < 200
    # what differs in one number of thousands is told apart
    changed = Cut((*bounds[:-1], bounds[-1] + 1), members)
    assert changed.describe() != found[1].describe()


# -- boxes


@st.composite
def grids(draw):
    """(shape, edges along each axis, the ranks in the grid's order) of a stack of matrices."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)))
    parts = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2),
                                  (2, 1, 3), (2, 2, 2), (1, 6, 1), (3, 1, 2)]))  # fmt: skip
    edges = []
    for size, count in zip(shape, parts, strict=True):
        inner = draw(st.lists(st.integers(0, size), min_size=count - 1, max_size=count - 1))
        edges.append([0, *sorted(inner), size])
    ranks = draw(st.permutations(range(parts[0] * parts[1] * parts[2])))
    return shape, edges, ranks


@quick
@given(grids(), st.booleans())
def test_boxes_put_every_element_where_the_slices_say(drawn, halves):
    shape, edges, ranks = drawn
    layers, m, n = shape
    places = list(product(*(range(len(e) - 1) for e in edges)))
    boxes = [()] * len(ranks)
    for rank, place in zip(ranks, places, strict=True):
        boxes[rank] = tuple((e[i], e[i + 1]) for e, i in zip(edges, place, strict=True))
    values = torch.arange(layers * m * n).view(shape)
    local = [values[tuple(slice(*ends) for ends in box)].flatten().tolist() for box in boxes]
    groups = [[(0, m)]]
    if halves and m % 4 == 0:  # two interleaved parts
        groups = [[(0, m // 4), (m // 2, m // 4)], [(m // 4, m // 4), (3 * m // 4, m // 4)]]
    for k, blocks, columns in product(range(layers), groups, [None, *column_groups(n)]):
        rows = [row for first, count in blocks for row in range(first, first + count)]
        cols = columns_of(columns) if columns else list(range(n))
        starts = tuple((k * m * n + first * n, count) for first, count in blocks)
        matrix = Matrix("w", (len(rows), len(cols)), starts, columns=columns)
        whole = torch.full(matrix.shape, -1)
        lines, holders = set(), set()
        for rank in range(len(ranks)):
            layout = grid_layout(matrix, m * n, tuple(boxes), rank, tensor=2)
            lines.add(layout.describe())
            for tile in layout.tiles:
                assert tile.tensor == 2
                part = whole[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
                assert part.shape == (tile.rows, tile.cols)
                begin, end = tile.part(rank)
                for j in range(begin, end):
                    row, col = divmod(j, tile.cols)
                    assert part[row, col] == -1  # nobody else's
                    part[row, col] = local[rank][tile.local(j, rank)]
                parts = [each for each in tile.parts() if each[0] == rank]
                assert parts == ([(rank, begin, end)] if begin < end else [])
                pieces = [p.view(torch.tensor(local[rank])) for p in tile_pieces(tile, 0, rank)]
                stored = [x for piece in pieces for x in piece.flatten().tolist()]
                assert stored == part.flatten()[begin:end].tolist()
                assert len(pieces) <= (3 if tile.pitch else 1)
                holders |= {rank} if begin < end else set()
        assert torch.equal(whole, values[k][rows][:, cols])
        assert len(lines) == 1  # where it lies in a rank's own tensor is that rank's business
        assert set(layout.holders()) == holders
        assert layout.stacked() == (len({(t.col, t.cols) for t in layout.tiles}) == 1)


def column_groups(n):
    """Parts of n columns: halves, every second or third one, two runs."""
    if n % 2 == 0:
        yield from (Columns(n, ((first, n // 2),)) for first in (0, n // 2))
        yield from (Columns(n, ((first, n // 2),), 2) for first in (0, 1))
    if n % 3 == 0:
        yield Columns(n, ((1, n // 3),), 3)
    if n > 3:
        yield Columns(n, ((0, 1), (2, 2)))


def columns_of(columns):
    return [first + columns.step * i for first, count in columns.runs for i in range(count)]


@quick
@given(st.data())
def test_columns_in_a_flat_sequence(data):
    m, n = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 7))
    offset = data.draw(st.integers(0, 5))
    cut, lengths = data.draw(cuts(offset + m * n))
    values = torch.arange(m * n).view(m, n)
    sequence = torch.cat([torch.full((offset,), -1), values.flatten()])
    sequence = torch.nn.functional.pad(sequence, (0, max(0, sum(lengths) - len(sequence))))
    for columns in column_groups(n):
        wanted = values[:, columns_of(columns)]
        layout = flat_layout(
            Matrix("w", tuple(wanted.shape), ((0, m),), columns=columns), cut, offset=offset, base=2
        )
        whole = torch.full(wanted.shape, -1)
        for rank in range(len(lengths)):
            begin, end = cut.run(rank)
            local = torch.nn.functional.pad(sequence[begin:end], (2, 0))
            for tile in layout.tiles:
                first, last = tile.part(rank)
                box = whole[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
                views = [p.view(local).flatten() for p in tile_pieces(tile, 0, rank)]
                if views:
                    rows = box.flatten().clone()
                    assert (rows[first:last] == -1).all()
                    rows[first:last] = torch.cat(views)
                    box.copy_(rows.view(box.shape))
        assert torch.equal(whole, wanted)


@pytest.mark.parametrize("members", [None, (3, 1, 2, 0)])
def test_rows_alone_are_as_a_cut(members):
    """FSDP's Shard(0) of a matrix, by both ways to say it."""
    order = members or (0, 1, 2, 3)
    edges = (0, 3, 3, 5, 6)
    boxes = [()] * 4
    for i, rank in enumerate(order):
        boxes[rank] = ((0, 1), (edges[i], edges[i + 1]), (0, 5))
    matrix = Matrix("w", (6, 5), ((0, 6),))
    cut = flat_layout(matrix, Cut(tuple(e * 5 for e in edges), members))
    for rank in range(4):
        box = grid_layout(matrix, 30, tuple(boxes), rank)
        for r in range(4):
            assert length_of(box.tiles[0], r) == length_of(cut.tiles[0], r)
        if length_of(cut.tiles[0], rank):
            assert run_of(box.tiles[0], rank) == run_of(cut.tiles[0], rank)
        assert len(box.tiles) == 1
        assert box.stacked()


def test_boxes_of_thousands_of_ranks_are_laid_in_reasonable_time():
    """A loose bound: others use this CPU."""
    rows, columns = 256, 8
    boxes = tuple(
        ((0, 1), (16 * r, 16 * (r + 1)), (512 * c, 512 * (c + 1)))
        for r in range(rows) for c in range(columns)
    )  # fmt: skip
    begin = time.perf_counter()
    for i in range(300):
        matrix = Matrix(f"w{i}", (4096, 4096), ((0, 4096),))
        layout = grid_layout(matrix, 4096 * 4096, boxes, 77, i)
        assert len(layout.describe()) < 100 * columns
    assert time.perf_counter() - begin < 10
    assert len(layout.holders()) == rows * columns
