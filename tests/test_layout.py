"""Cuts, tiles and layouts against their definitions, element by element."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.sharding.layout import Cut, Layout, Matrix, Tile, lay

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
        start, length = tile.run(rank)
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
    layout = lay(Matrix("w", (4, 4), ((0, 4),)), Cut.even(16, 10**6))
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
        layout = lay(matrix, cut, offset=10, base=5, tensor=3)
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

    def line(replicated=False, **changes):
        o = {**base, **changes}
        matrix = Matrix(o["name"], o["shape"], o["blocks"])
        return lay(matrix, o["cut"], offset=o["offset"], replicated=replicated).describe()

    lines = [
        line(),
        line(name="v"),
        line(shape=(6, 4), blocks=((0, 6),)),
        line(blocks=((0, 2), (12, 2))),
        line(cut=Cut((0, 6, 24))),
        line(cut=Cut((0, 5, 24, 24))),
        line(cut=Cut.even(12, 2)),
        line(offset=1),
        line(replicated=True),
    ]
    assert len(set(lines)) == len(lines)
    assert line() == line()
    # where a run lies in a rank's own tensor is that rank's business
    matrix = Matrix("w", (4, 6), ((0, 4),))
    assert lay(matrix, cut, base=7, tensor=2).describe() == line()
