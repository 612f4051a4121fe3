"""The calls and bytes of an exchange, counted by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.layout import Cut, flat_layout
from spectral_dist.sharding.matrix import Matrix
from tests.support import harness
from tests.unit.sharding.exchanges import FunctionTask, grid, make


def exchange_once(layouts, sizes, numel=1 << 30, **where):
    """Owners, calls and bytes of one exchange of tensors that are all ones."""
    exchange, plan, meter = make(layouts, numel, **where)
    views = exchange.local_runs.views([torch.ones(size) for size in sizes])
    exchange.run(
        FunctionTask(
            lambda pieces: [views[p] for p in pieces], lambda whole: whole, lambda *_: None
        )
    )
    return plan.owners, meter.calls, meter.bytes


def straddling():
    # one buffer of 20 in two halves: a (2 x 3) on rank 0, b (3 x 4) straddles as 4 + 8, c on rank 1
    cut = Cut.even(10, 2)
    shapes = (("a", 2, 3, 0), ("b", 3, 4, 6), ("c", 1, 2, 18))
    layouts = [flat_layout(Matrix(x, (m, n), ((0, m),)), cut, offset=o) for x, m, n, o in shapes]
    return exchange_once(layouts, [10])


def test_bytes_of_a_straddling_matrix():
    # b goes to rank 1, whose load (c: 1 * (4 + 1)) is below rank 0's (a: 4 * (6 + 2)); 4 elements
    # of 4 bytes go there, and 4 come back; a and c cost nothing
    for result in harness.run(2, straddling):
        assert result == ((0, 1, 1), {"all_to_all": 2}, {"all_to_all": 16})


def fully_sharded():
    # a: 4 x 4 as 6 + 6 + 4; the owner of the only matrix is the rank with the most of it, rank 0
    layouts = [flat_layout(Matrix("a", (4, 4), ((0, 4),)), Cut((0, 3, 10, 16)))]
    rank = dist.get_rank()
    return exchange_once(layouts, [(3, 7, 6)[rank]])


def test_bytes_of_a_matrix_sharded_over_all_ranks():
    results = harness.run(3, fully_sharded)
    (owner,) = results[0][0]
    held = (3, 7, 6)
    for rank, (owners, calls, sent) in enumerate(results):
        assert (owners, calls) == ((owner,), {"all_to_all": 2})
        # everyone sends what it holds; the owner what the others hold
        assert sent == {"all_to_all": 4 * (16 - held[owner] if rank == owner else held[rank])}


def replicas(numel):
    shapes = ((2, 3), (2, 3), (2, 2))
    layouts = [
        flat_layout(Matrix(f"m{i}", (m, n), ((0, m),)), Cut((0, m * n)), tensor=i)
        for i, (m, n) in enumerate(shapes)
    ]
    return exchange_once(layouts, [6, 6, 4], numel, group=None, replicas=dist.group.WORLD)


def test_bytes_of_replicas():
    # owners 0, 1, 0 own 10 and 6 numbers; the gather is padded: everyone sends 10 to the other
    for result in harness.run(2, replicas, 1 << 30):
        assert result == ((0, 1, 0), {"all_gather": 1}, {"all_gather": 40})
    # at most 7 numbers an owner: {0: m0, 1: m1} padded to 6, then {0: m2} padded to 4
    for result in harness.run(2, replicas, 14):
        assert result == ((0, 1, 0), {"all_gather": 2}, {"all_gather": 40})


def sharded_and_replicated():
    """2 replicas x 2 ranks, a matrix in halves and two on the second rank: (owners, cost)."""
    group, copies = grid(2, 2, False)
    rank = collectives.rank(group)
    layouts = [
        flat_layout(Matrix("halves", (4, 4), ((0, 4),)), Cut.even(8, 2), tensor=0),
        flat_layout(Matrix("second", (2, 3), ((0, 2),)), Cut((0, 0, 6)), tensor=1),
        flat_layout(Matrix("third", (2, 2), ((0, 2),)), Cut((0, 0, 4)), tensor=2),
    ]
    return exchange_once(layouts, [8, *((0, 0), (6, 4))[rank]], group=group, replicas=copies)


def test_bytes_of_sharded_matrices_with_replicas():
    # the costliest, "halves", goes to rank 0 of replica 0, "second" to rank 1 of replica 0, "third"
    # to rank 1 of replica 1. 8 elements to the owner of "halves" and 8 back, in replica 0 only;
    # then each replica gives the other what it has. In the bucket of "halves" 8 of replica 0, which
    # replica 1 pads to; in the other one nothing at ranks 0, and 6 at ranks 1, padded for 4
    results = harness.run(4, sharded_and_replicated)
    for place, (owners, calls, sent) in enumerate(results):
        assert owners == (0, 1, 3)
        assert calls == {"all_to_all": 2, "all_gather": 2}
        gathered = 4 * (8, 8 + 6)[place % 2]
        assert sent == {"all_to_all": 4 * 8 * (place < 2), "all_gather": gathered}
