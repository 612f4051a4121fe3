"""Shards -> owners -> shards -> replicas over real gloo, against a framework that slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding import plan as plans
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.exchange import MatrixTask
from spectral_dist.sharding.layout import Cut, Layout, Tile, flat_layout
from spectral_dist.sharding.matrix import Matrix
from tests.reference.layouts import UNTOUCHED, World, random_world
from tests.support import harness
from tests.unit.sharding.exchanges import HOME, FunctionTask, grid, make

ROUNDS = 40


def direction(whole):
    """Not symmetric in anything: a direction that comes back misplaced is another number."""
    m, n = whole.shape
    return whole + (3 * torch.arange(m)[:, None] + 5 * torch.arange(n)) % 50


class Checked(MatrixTask):
    """A task that knows the truth: what must arrive where, in which dtype, how often."""

    def __init__(self, world, exchange, plan, wire, here):
        self.world, self.exchange, self.plan, self.wire = world, exchange, plan, wire
        self.rank, self.replica, self.ranks = here
        self.inputs = self.packed(world.mine)
        self.outputs = [torch.full_like(t, UNTOUCHED, dtype=HOME) for t in world.mine]
        self.targets = exchange.local_runs.views(self.outputs)
        self.owned, self.asked, self.settled = [], [], []

    def packed(self, tensors):
        """The given runs out of tensors that hold nothing else, as an owner's momentum does."""
        views, given = self.exchange.local_runs.views(tensors), self.exchange.owned_runs
        found = {}
        for index, tensor in enumerate(tensors):
            ours = [piece for piece in given.pieces if piece.tensor == index]
            packed = torch.cat([torch.empty(0), *(views[piece].flatten() for piece in ours)])
            assert len(packed) == given.numel.get(index, 0)
            is_whole = max([piece.end for piece in ours], default=0) == len(packed)
            if is_whole and not all(piece.is_run for piece in ours):
                packed = tensor[: len(packed)]  # they stay where they are
            assert torch.equal(given.pack(index, tensor), packed)
            found |= given.packed_views(index, packed)
        return found

    def owner_is_here(self, piece):
        return self.plan.owners[piece.matrix] // self.ranks == self.replica

    def update_input(self, pieces):
        assert all(map(self.owner_is_here, pieces))
        self.asked += pieces
        return [self.inputs[piece] for piece in pieces]

    def direction(self, matrices, which):
        assert matrices.dtype == self.wire
        assert len(matrices) == len(which)
        wholes = [self.world.truths[i].whole for i in which]
        for i, matrix, whole in zip(which, matrices, wholes, strict=True):
            assert torch.equal(matrix.float(), whole), self.world.layouts[i]
        self.owned += which
        return torch.stack([direction(matrix.float()) for matrix in matrices])

    def slab_direction(self, slabs, reduction):
        raise AssertionError("no matrix is in slabs")

    def apply(self, pieces, directions):
        self.settled += pieces
        for piece, part in zip(pieces, directions, strict=True):
            assert part.dtype == HOME
            assert part.numel() == piece.length
            self.targets[piece].copy_(part)

    def check(self):
        """After the exchange."""
        mine = self.replica * self.ranks + self.rank
        assert sorted(self.owned) == [i for i, o in enumerate(self.plan.owners) if o == mine]
        stored, given = self.exchange.local_runs.pieces, self.exchange.owned_runs.pieces
        assert sorted(self.settled, key=repr) == sorted(stored, key=repr)
        assert sorted(self.asked, key=repr) == sorted(given, key=repr)
        assert given == [piece for piece in stored if self.owner_is_here(piece)]
        for truth in self.world.truths:
            truth.direction.copy_(direction(truth.whole))
        for out, wanted in zip(self.outputs, self.world.expected(), strict=True):
            assert torch.equal(out, wanted.to(HOME))


def there_and_back(world: World, numel: int, wire: torch.dtype, where=(None, None)):
    """Every matrix to its owner, and its direction back to where its elements are stored."""
    group, replicas = where
    exchange, plan, meter = make(world.layouts, numel, wire, group, replicas)
    here = (collectives.rank(group), collectives.rank(replicas), collectives.size(group))
    task = Checked(world, exchange, plan, wire, here)
    exchange.run(task)
    task.check()
    return plan, meter


def costs(world, plan, here, replicas, wire):
    """(calls, bytes) that one exchange must have cost this rank."""
    rank, replica, ranks = here
    calls, sent = dict.fromkeys(("all_to_all", "all_gather", "broadcast"), 0), 0
    for truth, owner in zip(world.truths, plan.owners, strict=True):
        if owner // ranks == replica:
            mine = owner % ranks == rank
            elements = truth.whole.numel() - truth.held(rank) if mine else truth.held(rank)
            sent += elements * wire.itemsize
    for bucket in plan.buckets:
        here = [i for indices in bucket.matrices.values() for i in indices]
        moves = any(len(world.truths[i].holders.unique()) > 1 for i in here)
        assert bucket.moves == moves
        calls["all_to_all"] += 2 * moves
        if replicas > 1:
            given = [0] * replicas
            for i in here:
                given[plan.owners[i] // ranks] += world.truths[i].held(rank)
            most = given[replica] if bucket.in_turn else max(given)
            sent += (replicas - 1) * most * wire.itemsize
            senders = {plan.owners[i] // ranks for i in here}
            calls["broadcast" if bucket.in_turn else "all_gather"] += (
                len(senders) if bucket.in_turn else 1
            )
    return {name: count for name, count in calls.items() if count}, sent


@contextmanager
def gathering(at_once: bool) -> Iterator[None]:
    """Directions are gathered from all replicas at once, or sent by one after the other."""
    original = plans.AT_ONCE
    plans.AT_ONCE = original if at_once else 0
    try:
        yield
    finally:
        plans.AT_ONCE = original


def rounds(ranks: int, replicas: int, wire_name: str, seed: int) -> int:
    wire = getattr(torch, wire_name)
    largest = 1 << 20 if wire is torch.float32 else 100  # exact in the wire's dtype
    moved = 0
    for count in range(ROUNDS):
        where = grid(ranks, replicas, count % 2 == 0)
        here = (collectives.rank(where[0]), collectives.rank(where[1]), ranks)
        world = random_world(seed + count, ranks, here[0], largest=largest)
        numel = (1, 30, 1 << 30, 7)[count % 4]
        with gathering(at_once=count % 3 > 0):
            plan, meter = there_and_back(world, numel, wire, where)
        assert all(b.in_turn == (replicas > 1 and count % 3 == 0) for b in plan.buckets)
        calls, sent = costs(world, plan, here, replicas, wire)
        assert meter.calls == calls
        assert sum(meter.bytes.values()) == sent
        moved += sent
    return moved


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.fast_cases("3-float32", "3-bfloat16")
def test_shards_reach_their_owner_and_return(ranks, wire):
    assert sum(harness.run(ranks, rounds, ranks, 1, wire, 100 * ranks)) > 0


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.fast_cases("3-float32", "3-bfloat16")
def test_whole_matrices_reach_their_replicas(replicas, wire):
    """DDP: each matrix at one owner."""
    assert sum(harness.run(replicas, rounds, 1, replicas, wire, 100 * replicas)) > 0


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.fast_cases("bfloat16")
def test_shards_reach_their_replicas(wire):
    """HSDP: shards to an owner in one replica and back, then to the other replica."""
    assert sum(harness.run(4, rounds, 2, 2, wire, 900)) > 0


def collectives_in_order(ranks, replicas):
    """The collectives of one exchange whose buckets move and do not, in their order here."""
    group, copies = grid(ranks, replicas, False)
    names = {id(group): "group", id(copies): "replicas"}
    order = []

    def recorded(name):
        original = getattr(collectives, name)

        @wraps(original)
        def call(*args):
            order.append((name, *[names[id(a)] for a in args if id(a) in names and a is not None]))
            return original(*args)

        return original, call

    originals = {}
    for name in ("all_to_all", "all_gather", "broadcast"):
        originals[name], call = recorded(name)
        setattr(collectives, name, call)
    try:
        for seed in range(50, 60):
            world = random_world(seed, ranks, collectives.rank(group), largest=1 << 20)
            with gathering(at_once=seed % 2 > 0):
                there_and_back(world, 9, torch.float32, (group, copies))
            order.append("end")
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)
    return order


@pytest.mark.parametrize(("ranks", "replicas"), [(4, 1), (2, 2), (1, 3)])
def test_all_ranks_call_the_same_collectives_in_one_order(ranks, replicas):
    first, *rest = harness.run(ranks * replicas, collectives_in_order, ranks, replicas)
    assert all(order == first for order in rest)
    assert (("all_to_all", "group") in first) == (ranks > 1)
    assert (("all_gather", "replicas") in first) == (replicas > 1)
    assert (("broadcast", "replicas") in first) == (replicas > 1)


def test_alone_nothing_is_sent():
    for seed in range(30):
        world = random_world(seed, 1, 0, largest=1 << 20)
        plan, meter = there_and_back(world, (1, 30, 1 << 30)[seed % 3], torch.float32)
        assert set(plan.owners) == {0}
        assert meter == Meter()


def test_rounds_to_the_wire_even_if_nothing_is_sent():
    matrix = Matrix("w", (2, 2), ((0, 2),))
    exchange, _, _ = make([flat_layout(matrix, Cut((0, 4)))], wire=torch.bfloat16)
    seen = []

    def whole(matrices):
        seen.append(matrices[0].float())
        return torch.tensor([[[0.5, 1.001], [1.5, 257.0]]])

    def apply(pieces, directions):
        seen.append(directions[0].float())

    def update_input(pieces):
        return [torch.tensor([1.0, 1.001, 1.5, 257.0])]

    exchange.run(FunctionTask(update_input, whole, apply))
    assert torch.equal(seen[0], torch.tensor([[1.0, 1.0], [1.5, 256.0]]))
    assert torch.equal(seen[1], torch.tensor([0.5, 1.0, 1.5, 256.0]))


def tp2_by_dp2():
    """Column tiles of a 4 x 6 matrix (TP 0: 4 columns, TP 1: 2), each cut over its two replicas."""
    rank = dist.get_rank()
    whole = torch.arange(24.0).view(4, 6)
    # ranks 0 and 2 are TP 0, ranks 1 and 3 are TP 1; the others' runs are empty
    left, right = Cut((0, 5, 5, 16, 16)), Cut((0, 0, 4, 4, 8))
    tiles = (Tile(0, 0, 4, 4, left, 0), Tile(0, 4, 4, 2, right, 0))
    layout = Layout(Matrix("w", (4, 6), ((0, 4),)), tiles)
    flat = [whole[:, :4].flatten(), whole[:, 4:].flatten()][rank % 2]
    mine = [flat[:5], flat[:4], flat[5:], flat[4:]][rank]
    exchange, plan, _ = make([layout])
    (view,) = exchange.local_runs.views([mine]).values()
    seen, back = [], []

    def apply(pieces, directions):
        back.extend(directions)

    def ten_times(matrices):
        seen.append(matrices.clone())
        return matrices * 10

    exchange.run(FunctionTask(lambda pieces: [view] if pieces else [], ten_times, apply))
    assert len(seen) == (rank == plan.owners[0])
    assert all(torch.equal(matrices[0], whole) for matrices in seen)
    assert torch.equal(torch.cat(back).float(), mine * 10)
    return layout.holders()


def test_tensor_parallel_tiles_cut_over_their_replicas():
    assert harness.run(4, tp2_by_dp2) == [[0, 1, 2, 3]] * 4
