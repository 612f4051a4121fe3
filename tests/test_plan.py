"""Owners and buckets: properties on random layouts, and small cases against brute force."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spectral_dist.sharding.layout import Cut, Matrix, lay
from spectral_dist.sharding.plan import make_plan

quick = settings(max_examples=150, deadline=None, derandomize=True)
sides = st.sampled_from([1, 2, 3, 5, 8, 13])
HUGE = 1 << 40


def price(shape):
    s, long = min(shape), max(shape)
    return s * s * (2 * long + s)


def layout(i, shape, cut, offset=0, replicated=False):
    matrix = Matrix(f"w{i}", shape, ((0, shape[0]),))
    return lay(matrix, cut, offset=offset, replicated=replicated)


@st.composite
def sharded(draw):
    """Layouts of matrices in flat buffers and on their own, each cut evenly, unevenly, emptily."""
    ranks = draw(st.integers(1, 5))
    layouts = []
    for _ in range(draw(st.integers(1, 3))):
        shapes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=6))
        total = sum(m * n for m, n in shapes)
        if draw(st.booleans()):
            cut = Cut.even(-(-total // ranks), ranks)
        else:
            inner = sorted(draw(st.lists(st.integers(0, total), min_size=ranks - 1,
                                         max_size=ranks - 1)))  # fmt: skip
            cut = Cut((0, *inner, total))
        offset = 0
        for m, n in shapes:
            layouts.append(layout(len(layouts), (m, n), cut, offset))
            offset += m * n
    return layouts, ranks


@st.composite
def replicated(draw):
    ranks = draw(st.integers(1, 5))
    shapes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=12))
    return [
        layout(i, (m, n), Cut((0, m * n)), replicated=True) for i, (m, n) in enumerate(shapes)
    ], ranks


def held(layouts, i, rank):
    return sum(tile.run(rank)[1] for tile in layouts[i].tiles)


@quick
@given(sharded())
def test_every_matrix_has_one_owner_that_holds_a_part(drawn):
    layouts, ranks = drawn
    plan = make_plan(layouts, ranks, HUGE)
    assert len(plan.owners) == len(layouts)
    for i, owner in enumerate(plan.owners):
        assert held(layouts, i, owner) > 0


@quick
@given(sharded(), st.sampled_from([1, 20, 100, HUGE]))
def test_a_matrix_on_one_rank_stays_there_and_does_not_move(drawn, numel):
    layouts, ranks = drawn
    plan = make_plan(layouts, ranks, numel)
    moving = {i for b in plan.buckets if b.moves for owned in b.matrices.values() for i in owned}
    for i, owner in enumerate(plan.owners):
        whole = [r for r in range(ranks) if held(layouts, i, r) == layouts[i].matrix.numel]
        assert not whole or whole == [owner]
        assert (i in moving) == (not whole)
    moves = [bucket.moves for bucket in plan.buckets]
    # the first exchange is in flight while something is computed, if there is something
    assert not moves[0] or all(moves)


@quick
@given(st.one_of(sharded(), replicated()), st.sampled_from([1, 20, 100, 400, HUGE]))
def test_buckets_hold_every_matrix_once_and_respect_the_bound(drawn, numel):
    layouts, ranks = drawn
    plan = make_plan(layouts, ranks, numel)
    seen = []
    for bucket in plan.buckets:
        assert bucket.matrices
        sizes = []
        for owner, indices in bucket.matrices.items():
            assert indices
            assert all(plan.owners[i] == owner for i in indices)
            sizes.append((sum(layouts[i].matrix.numel for i in indices), len(indices)))
            seen += indices
        # directions of replicas are gathered everywhere, padded to the largest owner's
        share = numel // ranks if layouts[0].replicated and ranks > 1 else numel
        assert all(size <= share or count == 1 for size, count in sizes)
    assert sorted(seen) == list(range(len(layouts)))
    if numel == HUGE:
        assert len(plan.buckets) <= 2


@quick
@given(st.one_of(sharded(), replicated()))
def test_loads_are_the_costs_of_what_each_rank_owns(drawn):
    layouts, ranks = drawn
    plan = make_plan(layouts, ranks, HUGE)
    loads = [0] * ranks
    for i, owner in enumerate(plan.owners):
        loads[owner] += price(layouts[i].matrix.shape)
    assert list(plan.loads) == loads
    assert plan.imbalance == pytest.approx(max(loads) / (sum(loads) / ranks))


@quick
@given(st.one_of(sharded(), replicated()))
def test_the_costliest_goes_first_to_the_least_loaded_holder(drawn):
    """Replayed one by one: what does not move is there before."""
    layouts, ranks = drawn
    plan = make_plan(layouts, ranks, HUGE)
    loads, free = [0] * ranks, []
    for i, x in enumerate(layouts):
        holders = [r for r in range(ranks) if x.replicated or held(layouts, i, r)]
        if len(holders) == 1 and not x.replicated:
            loads[holders[0]] += price(x.matrix.shape)
        else:
            free.append((price(x.matrix.shape), i, holders))
    for cost, i, holders in sorted(free, key=lambda item: (-item[0], item[1])):
        least = min(loads[r] for r in holders)
        assert loads[plan.owners[i]] == least
        loads[plan.owners[i]] += cost


def test_of_equally_loaded_holders_it_goes_to_the_one_with_most():
    uneven = layout(0, (4, 4), Cut((0, 3, 10, 16)))
    assert make_plan([uneven], 3, HUGE).owners == (1,)
    # and of four ranks, one of which holds nothing
    assert make_plan([layout(0, (4, 4), Cut((0, 3, 10, 16, 16)))], 4, HUGE).owners == (1,)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 3), st.lists(st.tuples(sides, sides), min_size=1, max_size=7), st.booleans())
def test_largest_load_is_within_four_thirds_of_the_best(ranks, shapes, everywhere):
    """Graham's bound 4/3 - 1/(3 P) against all assignments, if every rank may own all."""
    layouts = []
    for i, (m, n) in enumerate(shapes):
        m, n = m + 1, n + 1  # at least one element for each rank
        cut = Cut((0, m * n)) if everywhere else Cut.even(-(-m * n // ranks), ranks)
        layouts.append(layout(i, (m, n), cut, replicated=everywhere))
    costs = [price(x.matrix.shape) for x in layouts]
    best = min(
        max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == r)
            for r in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )  # fmt: skip
    assume(everywhere or all(held(layouts, i, ranks - 1) for i in range(len(layouts))))
    assert max(make_plan(layouts, ranks, HUGE).loads) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@quick
@given(st.one_of(sharded(), replicated()), st.sampled_from([1, 50, HUGE]))
def test_the_same_plan_every_time(drawn, numel):
    layouts, ranks = drawn
    assert make_plan(layouts, ranks, numel) == make_plan(list(layouts), ranks, numel)


@pytest.mark.parametrize("everywhere", [True, False])
def test_fewer_matrices_than_ranks(everywhere):
    shapes = [(4, 6), (2, 12), (4, 4)]
    layouts = [
        layout(i, s, Cut((0, s[0] * s[1])) if everywhere else Cut.even(3, 8), replicated=everywhere)
        for i, s in enumerate(shapes)
    ]
    plan = make_plan(layouts, 8, HUGE)
    assert len(set(plan.owners)) == 3
    assert sorted(plan.loads)[:5] == [0.0] * 5
    assert sorted(plan.loads)[5:] == [*sorted(float(price(s)) for s in shapes)]


def test_at_most_two_matrices_a_rank_straddle_a_flat_buffer():
    shapes = [(3 + i % 5, 4 + i % 3) for i in range(61)]
    total = sum(m * n for m, n in shapes)
    for ranks in (2, 3, 4, 7):
        cut, offset, layouts = Cut.even(-(-total // ranks), ranks), 0, []
        for i, (m, n) in enumerate(shapes):
            layouts.append(layout(i, (m, n), cut, offset))
            offset += m * n
        plan = make_plan(layouts, ranks, HUGE)
        moving = [i for b in plan.buckets if b.moves for x in b.matrices.values() for i in x]
        assert 0 < len(moving) <= ranks - 1
        for rank in range(ranks):
            assert sum(held(layouts, i, rank) > 0 for i in moving) <= 2


def test_one_rank_owns_everything_and_nothing_moves():
    layouts = [layout(i, (3, 4), Cut((0, 12)), replicated=i % 2 == 0) for i in range(4)]
    plan = make_plan(layouts, 1, HUGE)
    assert plan.owners == (0, 0, 0, 0)
    assert [bucket.moves for bucket in plan.buckets] == [False]


def test_equal_shapes_are_neighbours():
    """So that a bucket holds few batches: A B A B of one cost would be four."""
    shapes = [(2, 8), (8, 2)] * 6  # of equal cost
    layouts = [layout(i, s, Cut((0, 16))) for i, s in enumerate(shapes)]
    (bucket,) = make_plan(layouts, 1, HUGE).buckets
    order = [shapes[i] for i in bucket.matrices[0]]
    assert sum(a != b for a, b in itertools.pairwise(order)) == 1


def test_thousands_of_matrices_on_a_thousand_ranks():
    """2000 matrices that all of 1024 ranks hold: seconds. A loose bound: others use this CPU."""
    shapes = [(1024, 4096), (4096, 1024), (1024, 1024), (1024, 2816)] * 500
    layouts = [layout(i, (m, n), Cut.even(m * n // 1024, 1024)) for i, (m, n) in enumerate(shapes)]
    begin = time.perf_counter()
    plan = make_plan(layouts, 1024, 1 << 24)
    assert time.perf_counter() - begin < 20
    assert all(load > 0 for load in plan.loads)
    assert plan.imbalance < 2
