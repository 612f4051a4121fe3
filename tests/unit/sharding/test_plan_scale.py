"""Set-up at scale, counted and not timed: nothing is done or kept for each rank of each matrix."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.sharding import boxes, slabs
from spectral_dist.sharding.boxes import Ranges
from spectral_dist.sharding.layout import Cut, StackBoxes, flat_layout, grid_layout, holders_of
from spectral_dist.sharding.matrix import Matrix
from spectral_dist.sharding.plan import make_plan
from tests.support.tiles import length_of

RANKS = 16384
quick = settings(max_examples=200, deadline=None, derandomize=True)
SHAPES = [(8192, 8192), (1024, 8192), (8192, 1024), (28672, 8192), (8192, 28672)]


def by_rows(layers, ranks, shapes=SHAPES):
    """As FSDP2 lays them."""
    layouts = []
    for i, (m, n) in enumerate(shapes * layers):
        chunk = -(-m // ranks)
        edges = [min(m, r * chunk) for r in range(ranks + 1)]
        cuts = StackBoxes(((0, 1), (edges[r], edges[r + 1]), (0, n)) for r in range(ranks))
        layouts.append(grid_layout(Matrix(f"w{i}", (m, n), ((0, m),)), m * n, cuts, 5, i))
    return layouts


def flat(layers, ranks):
    """As ZeRO lays them."""
    numel = sum(m * n for m, n in SHAPES * layers)
    cut, offset, layouts = Cut.even(-(-numel // ranks), ranks), 0, []
    for i, (m, n) in enumerate(SHAPES * layers):
        layouts.append(flat_layout(Matrix(f"w{i}", (m, n), ((0, m),)), cut, offset=offset))
        offset += m * n
    return layouts


# 128256 rows are 7.8 a rank: the last run is short, and some ranks have none
@pytest.mark.parametrize("shape", [*SHAPES, (128255, 4096), (RANKS * 3, 64)])
def test_layouts_and_slabs_of_many_ranks_are_small(shape):
    layouts = by_rows(1, RANKS, [shape]) + flat(1, RANKS)
    for layout in layouts:
        assert len(pickle.dumps(layout)) < 1000
        assert len(pickle.dumps(boxes.slabs(layout, RANKS))) < 1000


def test_slabs_are_found_once_for_matrices_that_are_cut_alike():
    boxes._slabs.cache_clear()
    layouts = by_rows(20, 64)
    make_plan(layouts, 64, 1 << 25, gram=[True] * len(layouts))
    for layout in layouts:
        boxes.slabs(layout, 64)
    seen = boxes._slabs.cache_info()
    assert (seen.misses, seen.hits + seen.misses) == (len(SHAPES), 2 * len(layouts))


def runs_looked_at(layouts, ranks, monkeypatch):
    """How many runs of cuts the plans and one rank's routes go through."""
    for cached in (boxes._slabs, slabs._transfers, holders_of):
        cached.cache_clear()
    count = 0
    original = Cut.runs

    def counted(self, start, stop):
        nonlocal count
        for run in original(self, start, stop):
            count += 1
            yield run

    with monkeypatch.context() as patch:
        patch.setattr(Cut, "runs", counted)
        for gram in ([], [True] * len(layouts)):
            plan = make_plan(layouts, ranks, 1, gram=gram)
            for bucket in plan.buckets if gram else ():
                slabs.route_to_slabs(bucket, layouts, 5, ranks, 0, 1)
    return count


def test_more_matrices_that_are_cut_alike_are_not_looked_at_again(monkeypatch):
    ranks = 512
    one, many = (runs_looked_at(by_rows(n, ranks), ranks, monkeypatch) for n in (1, 30))
    assert one == many > ranks  # 29 times more matrices


def test_a_flat_buffer_of_more_ranks_is_looked_at_run_by_run(monkeypatch):
    """Of all matrices together there are as many runs as ranks and matrices, and few slabs."""
    layouts = flat(4, 2048)
    square = [x for x in layouts if x.matrix.shape[0] >= x.matrix.shape[1]]
    assert runs_looked_at(square, 2048, monkeypatch) < 8 * (2048 + len(square))


@st.composite
def ranges(draw):
    """Ranges, and each rank's as the definition says."""
    ranks, length = draw(st.integers(1, 9)), draw(st.integers(1, 30))
    if draw(st.booleans()):
        wanted = [(length * r // ranks, length * (r + 1) // ranks) for r in range(ranks)]
        return Ranges.even(length, ranks), wanted
    if draw(st.booleans()):  # as torch.chunk cuts
        chunk = -(-length // ranks)
        edges = [*range(0, length, chunk), length]
        members = list(range(len(edges) - 1))
    else:
        inner = draw(st.sets(st.integers(1, length), max_size=ranks - 1)) - {length}
        edges = [0, *sorted(inner), length]
        members = draw(st.permutations(range(ranks)))[: len(edges) - 1]
    wanted = [(0, 0)] * ranks
    for begin, end, rank in zip(edges, edges[1:], members, strict=False):
        wanted[rank] = (begin, end)
    return Ranges(Cut.compact(edges, members), length, ranks), wanted


@quick
@given(ranges(), st.data())
def test_ranges_are_what_a_list_of_them_would_be(drawn, data):
    compact, wanted = drawn
    assert compact == tuple(wanted)
    assert [compact[rank] for rank in range(len(wanted))] == wanted
    begin, end = sorted(data.draw(st.integers(0, compact.length)) for _ in range(2))
    meeting = {
        (rank, max(begin, first), min(end, last))
        for rank, (first, last) in enumerate(wanted)
        if max(begin, first) < min(end, last)
    }
    given_ranges = list(compact.overlapping(begin, end))
    assert set(given_ranges) == meeting
    assert given_ranges == sorted(given_ranges, key=lambda one: one[1])


@quick
@given(ranges(), ranges())
def test_equal_ranges_say_the_same_and_hash_alike(one, other):
    if one[0] == other[0]:
        assert one[1] == other[1]
        assert hash(one[0]) == hash(other[0])
    assert one[0] == Ranges(one[0].cut, one[0].length, one[0].ranks, one[0].unit)


@quick
@given(st.data())
def test_owners_of_given_replicas_are_the_least_loaded_that_may(data):
    """Replayed one by one over all candidates; of equal loads, who holds more, then the first."""
    ranks, replicas = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    layouts, required_replicas = [], []
    for i in range(data.draw(st.integers(1, 8))):
        shape = data.draw(st.sampled_from([(2, 3), (3, 2), (4, 4), (6, 1)]))
        numel = shape[0] * shape[1]
        inner = sorted(data.draw(st.integers(0, numel)) for _ in range(ranks - 1))
        matrix = Matrix(f"w{i}", shape, ((0, shape[0]),))
        layouts.append(flat_layout(matrix, Cut((0, *inner, numel))))
        required_replicas.append(data.draw(st.integers(0, replicas - 1)))
    plan = make_plan(
        layouts,
        ranks,
        1 << 30,
        replicas,
        required_replicas=required_replicas,
        load=[float(x.matrix.shape[0]) for x in layouts],
    )
    loads = [0] * (ranks * replicas)
    held = [[length_of(x.tiles[0], r) for r in range(ranks)] for x in layouts]
    alone = [sum(map(bool, h)) == 1 and replicas == 1 for h in held]
    order = sorted(range(len(layouts)), key=lambda i: (not alone[i], -layouts[i].matrix.shape[0]))
    for i in order:
        holders = [r for r in range(ranks) if held[i][r]]
        if len(holders) > max(2, ranks // 2):
            holders = list(range(ranks))
        rank = min(holders, key=lambda r: (loads[required_replicas[i] * ranks + r], -held[i][r], r))
        assert plan.owners[i] == required_replicas[i] * ranks + rank
        loads[plan.owners[i]] += layouts[i].matrix.shape[0]


def test_boxes_are_hashed_once_and_as_a_tuple():
    class Counted(int):
        hashed = 0

        def __hash__(self):
            Counted.hashed += 1
            return int(self)

    cuts = StackBoxes([((0, 1), (0, 4), (Counted(0), 2)), ((0, 1), (0, 4), (2, 4))])
    assert hash(cuts) == hash(tuple(cuts))
    Counted.hashed = 0
    for i in range(3):
        grid_layout(Matrix("w", (4, 4), ((0, 4),)), 16, cuts, 0, i)
    assert Counted.hashed == 1  # as the columns of a strip, when the strips are found
