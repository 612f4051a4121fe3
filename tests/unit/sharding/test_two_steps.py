"""Exchanges in two steps, within hosts first: bit by bit those at once, and when they are taken."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from spectral_dist.machine import Machine
from spectral_dist.sharding import collectives
from spectral_dist.sharding.bucket_routes import route_to_owners
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.cost import ExchangeLoad, exchange_seconds
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.groups import host_groups
from spectral_dist.sharding.hosts import Grid
from spectral_dist.sharding.layout import Cut, flat_layout
from spectral_dist.sharding.matrix import Matrix
from spectral_dist.sharding.plan import make_plan
from spectral_dist.sharding.two_steps import TwoSteps, faster_in_two
from tests.reference.layouts import random_world
from tests.support import harness, sharded_model
from tests.unit.sharding.exchanges import grid as other_grid
from tests.unit.sharding.test_split import Split

SLOW = Machine(ranks_per_host=2, message=10.0)
"""Two ranks on each host, where a message is all that takes time."""

# -- one all-to-all


def random_counts(seed):
    """By sending and receiving rank; every second table has ranks that send or get nothing."""
    rng = random.Random(seed)
    counts = [[rng.choice([0, 1, 3, 50]) for _ in range(4)] for _ in range(4)]
    if seed % 2:
        counts[rng.randrange(4)] = [0] * 4
        silent = rng.randrange(4)
        for row in counts:
            row[silent] = 0
    return counts


def at_once_and_in_two():
    rank, meters = dist.get_rank(), (Meter(), Meter())
    groups = host_groups(dist.group.WORLD, Grid(2, 2))
    assert groups is host_groups(dist.group.WORLD, Grid(2, 2))
    crossed = 0
    for seed in range(20):
        counts = random_counts(seed)
        sent_to, got_from = counts[rank], [row[rank] for row in counts]
        sent = torch.arange(sum(sent_to)) + 1000 * rank
        wanted = collectives.all_to_all(sent, sent_to, got_from, dist.group.WORLD, meters[0])
        steps = TwoSteps(groups, sent_to, got_from, torch.device("cpu"))
        ours = steps.go_on(steps.begin(sent, meters[1]), meters[1])
        assert torch.equal(ours.wait(), wanted.wait())
        # within the host what is for the other number, between hosts what is for ours
        peer, here = rank ^ 1, rank & 2
        first = counts[rank][peer] + counts[rank][peer ^ 2]
        crossed += 8 * (first + sum(counts[r][rank ^ 2] for r in (here, here + 1)))
    assert meters[1].bytes["all_to_all"] == crossed
    assert meters[1].calls["all_to_all"] == 2 * meters[0].calls["all_to_all"]
    return meters[0].bytes["all_to_all"], crossed


def test_the_same_numbers_arrive_in_the_same_order():
    found = harness.run(4, at_once_and_in_two)
    assert all(in_two != at_once for at_once, in_two in found)


# -- an exchange


def there_and_back(ranks, replicas, apart, seed):
    """Every element arrives at its owner or its slab, and returns; how many buckets took two."""
    taken = [0, 0]
    for count in range(20):
        group, copies = (other_grid if apart else sharded_model.grid)(
            ranks, replicas, *([True] if apart else [])
        )
        rank, replica = collectives.rank(group), collectives.rank(copies)
        world = random_world(seed + count, ranks, rank, largest=1 << 20)
        rng = random.Random(seed + count)
        teams = [rng.choice([1, 1, 2]) for _ in world.layouts]
        numel = (1, 200, 1 << 30)[count % 3]
        plan = make_plan(world.layouts, ranks, numel, replicas, teams=teams)
        exchange = Exchange(
            world.layouts, plan, group=group, replicas=copies, device=torch.device("cpu"),
            like=torch.empty(0), wire_dtype=torch.float32, meter=Meter(), machine=SLOW,
        )  # fmt: skip
        exchange.run(task := Split(world, exchange, ranks, replica * ranks + rank, plan))
        for truth in world.truths:
            truth.direction.copy_(truth.whole + 1)
        for out, wanted in zip(task.outputs, world.expected(), strict=True):
            assert torch.equal(out, wanted)
        for route in exchange.routes:
            taken[route.two_steps is not None] += route.moves
    return taken


def test_any_layout_reaches_its_owner_and_returns():
    found = harness.run(4, there_and_back, 4, 1, False, 900)
    assert found == [found[0]] * 4
    at_once, in_two = found[0]
    assert in_two > 20
    assert at_once  # where no rank sends to all others


def test_ranks_that_are_apart_are_no_hosts():
    """Two replicas of two ranks: neighbours are one host, and the others are one of each host."""
    for apart in (False, True):
        for at_once, in_two in harness.run(4, there_and_back, 2, 2, apart, 700):
            assert at_once > 20
            assert not in_two


def fast(sizes):
    """Whether three exchanges are faster in two steps, as rank 0 sends no, few or many messages."""
    rank = dist.get_rank()
    counts = [[[100 * (rank > 0)] * 4, [0] * 4], [[0, 0, 1, 0], [0] * 4], [[1] * 4, [1] * 4]]
    machine = Machine(ranks_per_host=sizes, message=1.0)
    device = torch.device("cpu")
    return faster_in_two(counts, (dist.group.WORLD, None), 4, device, machine)


def test_all_ranks_choose_alike_and_only_on_equal_hosts():
    assert harness.run(4, fast, 2) == [(Grid(2, 2), [True, False, True])] * 4
    for sizes in (1, 3, 4):
        assert harness.run(4, fast, sizes) == [(None, [False] * 3)] * 4


# -- when it is predicted to be faster


def test_seconds_by_hand():
    machine = Machine(
        bandwidth=10.0, latency=1.0, host_bandwidth=5.0, host_latency=3.0, message=0.5,
        memory_bandwidth=8.0,
    )  # fmt: skip
    # rank 3 of 3 hosts of 2 is the second of the second host; it sends to four others
    at_once = 3 + 4 * 2 / 10 + (1 + 2 + 6) * 2 / 5 + 3 * 0.5
    first = (1 + 4 + 0) * 2 / 10  # to the first rank of each host
    in_two = 1 + 3 + first + 9 * 2 / 5 + 4 * 18 * 2 / 8 + 0.5
    load = ExchangeLoad.of([1, 2, 4, 5, 0, 6], 3, Grid(3, 2))
    found = [float(seconds) for seconds in exchange_seconds(load, Grid(3, 2), 2, machine)]
    assert found == pytest.approx((at_once, in_two))


@pytest.mark.parametrize(("message", "is_faster"), [(1e-5, True), (1e-6, True), (1e-8, False)])
def test_a_plan_for_1024_ranks(message, is_faster):
    """FSDP2 on 128 nodes of 8, every matrix cut over all: by the seconds that a message takes."""
    ranks, shape = 1024, (4096, 4096)
    cut = Cut.even(shape[0] * shape[1] // ranks, ranks)
    matrices = [Matrix(f"w{i}", shape, ((0, shape[0]),)) for i in range(ranks)]
    layouts = [flat_layout(matrix, cut) for matrix in matrices]
    (bucket,) = make_plan(layouts, ranks, 1 << 25).buckets
    machine, grid = Machine(message=message), Grid(128, 8)
    for rank in (0, 517, 1023):
        route = route_to_owners(bucket, layouts, rank, ranks, 0, 1)
        for counts in (route.send_counts, route.recv_counts):
            assert sum(counts) == shape[0] * shape[1]
            load = ExchangeLoad.of(counts, rank, grid)
            at_once, in_two = exchange_seconds(load, grid, 2, machine)
            assert (in_two < at_once) == is_faster
