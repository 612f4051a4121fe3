"""Shards -> owners -> shards -> replicas over real gloo, against a framework that slices."""

from __future__ import annotations

from functools import cache, wraps

import pytest
import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.exchange import Exchange, MatrixTask
from spectral_dist.sharding.layout import Cut, Layout, Matrix, Tile, flat_layout
from spectral_dist.sharding.plan import make_plan
from tests.reference.layouts import UNTOUCHED, World, random_world
from tests.support import harness

CPU = torch.device("cpu")
HOME = torch.float64  # in which directions come back
ROUNDS = 40


def direction(whole):
    """Not symmetric in anything: a direction that comes back misplaced is another number."""
    m, n = whole.shape
    return whole + (3 * torch.arange(m)[:, None] + 5 * torch.arange(n)) % 50


def group_here():
    return dist.group.WORLD if dist.is_initialized() else None


@cache
def grid(ranks, replicas, apart):
    """(group, replicas) of this rank; ``apart``: replicas are neighbours, ranks far apart."""
    everyone = torch.arange(ranks * replicas)
    rows = everyone.view(ranks, replicas).T if apart else everyone.view(replicas, ranks)
    found = []
    for lines, length in ((rows.tolist(), ranks), (rows.T.tolist(), replicas)):
        groups = [dist.new_group(line) if length > 1 else None for line in lines]
        where = [dist.get_rank() in line for line in lines].index(True)
        found.append(groups[where])
    return tuple(found)


def make(layouts, numel=1 << 30, wire=torch.float32, group="everyone", replicas=None):
    group = group_here() if group == "everyone" else group
    plan = make_plan(layouts, collectives.size(group), numel, collectives.size(replicas))
    meter = Meter()
    exchange = Exchange(
        layouts,
        plan,
        group=group,
        replicas=replicas,
        device=CPU,
        like=torch.empty(0, dtype=HOME),
        wire_dtype=wire,
        meter=meter,
    )
    return exchange, plan, meter


class Recorder(MatrixTask):
    """A task of plain functions."""

    def __init__(self, update_input, direction, apply):
        self._update_input, self._direction, self._apply = update_input, direction, apply

    def update_input(self, pieces):
        return self._update_input(pieces)

    def direction(self, matrices, which):
        return self._direction(matrices)

    def slab_direction(self, slabs, reduction):
        raise AssertionError("no matrix is in slabs")

    def apply(self, pieces, directions):
        self._apply(pieces, directions)


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
            mine = [views[piece] for piece in given.pieces if piece.tensor == index]
            packed = torch.cat([torch.empty(0), *mine])
            assert len(packed) == given.numel.get(index, 0)
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
    calls, sent = dict.fromkeys(("all_to_all", "all_gather"), 0), 0
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
            sent += (replicas - 1) * max(given) * wire.itemsize
            calls["all_gather"] += 1
    return {name: count for name, count in calls.items() if count}, sent


def rounds(ranks: int, replicas: int, wire_name: str, seed: int) -> int:
    wire = getattr(torch, wire_name)
    largest = 1 << 20 if wire is torch.float32 else 100  # exact in the wire's dtype
    moved = 0
    for count in range(ROUNDS):
        where = grid(ranks, replicas, count % 2 == 0)
        here = (collectives.rank(where[0]), collectives.rank(where[1]), ranks)
        world = random_world(seed + count, ranks, here[0], largest=largest)
        numel = (1, 30, 1 << 30, 7)[count % 4]
        plan, meter = there_and_back(world, numel, wire, where)
        calls, sent = costs(world, plan, here, replicas, wire)
        assert meter.calls == calls
        assert sum(meter.bytes.values()) == sent
        moved += sent
    return moved


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shards_reach_their_owner_and_return(ranks, wire):
    assert sum(harness.run(ranks, rounds, ranks, 1, wire, 100 * ranks)) > 0


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_whole_matrices_reach_their_replicas(replicas, wire):
    """DDP: each matrix at one owner."""
    assert sum(harness.run(replicas, rounds, 1, replicas, wire, 100 * replicas)) > 0


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
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
    for name in ("all_to_all", "all_gather"):
        originals[name], call = recorded(name)
        setattr(collectives, name, call)
    try:
        for seed in range(50, 60):
            world = random_world(seed, ranks, collectives.rank(group), largest=1 << 20)
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

    exchange.run(Recorder(update_input, whole, apply))
    assert torch.equal(seen[0], torch.tensor([[1.0, 1.0], [1.5, 256.0]]))
    assert torch.equal(seen[1], torch.tensor([0.5, 1.0, 1.5, 256.0]))


def exchange_once(layouts, sizes, numel=1 << 30, **where):
    """Owners, calls and bytes of one exchange of tensors that are all ones."""
    exchange, plan, meter = make(layouts, numel, **where)
    views = exchange.local_runs.views([torch.ones(size) for size in sizes])
    exchange.run(
        Recorder(lambda pieces: [views[p] for p in pieces], lambda whole: whole, lambda *_: None)
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

    exchange.run(Recorder(lambda pieces: [view] if pieces else [], ten_times, apply))
    assert len(seen) == (rank == plan.owners[0])
    assert all(torch.equal(matrices[0], whole) for matrices in seen)
    assert torch.equal(torch.cat(back).float(), mine * 10)
    return layout.holders()


def test_tensor_parallel_tiles_cut_over_their_replicas():
    assert harness.run(4, tp2_by_dp2) == [[0, 1, 2, 3]] * 4


def disagreement(kind):
    """The error's text on this rank; the last rank has other ideas about matrix b."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    differs = rank == ranks - 1
    names = ["a", "b", "c"]
    numel, wire = 1 << 30, torch.float32
    if differs and kind == "name":
        names[1] = "x"
    if differs and kind == "count":
        names = ["a"]
    if differs and kind == "bucket":
        numel = 12
    if differs and kind == "wire":
        wire = torch.bfloat16
    cut = Cut.even(12, ranks)
    layouts = []
    for i, name in enumerate(names):
        odd = differs and i == 1
        m, n = (4, 3) if odd and kind == "shape" else (2, 6)
        layouts.append(
            flat_layout(
                Matrix(name, (m, n), ((0, m),)),
                Cut((0, *range(11, 12 * ranks, 12), 12 * ranks)) if odd and kind == "cut" else cut,
                offset=7 if odd and kind == "offset" else 6,
            )
        )
    try:
        make(layouts, numel, wire)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["name", "count", "shape", "cut", "offset"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree_say_so_everywhere(ranks, kind, monkeypatch):
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    texts = harness.run(ranks, disagreement, kind)
    assert len(set(texts)) == 1
    assert "entry 1 is `b " in texts[0]
    assert "rank 0 but" in texts[0]
    assert f"on rank {ranks - 1}." in texts[0]
    assert "`nothing`" in texts[0] or kind != "count"


@pytest.mark.parametrize("kind", ["bucket", "wire"])
def test_ranks_that_disagree_about_buckets_or_the_wire_say_so(kind, monkeypatch):
    """They would exchange different numbers of bytes, or wait for each other for ever."""
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    texts = harness.run(2, disagreement, kind)
    assert "no error" not in texts
    assert len(set(texts)) == 1


def disagreement_of_a_replica():
    """2 replicas x 2 ranks; the last rank has another matrix."""
    group, copies = grid(2, 2, False)
    m, n = (4, 3) if dist.get_rank() == 3 else (2, 6)
    layouts = [flat_layout(Matrix("b", (m, n), ((0, m),)), Cut.even(6, 2))]
    try:
        make(layouts, group=group, replicas=copies)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_replicas_that_disagree_say_so_everywhere(monkeypatch):
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    texts = harness.run(4, disagreement_of_a_replica)
    assert all("entry 0 is `b " in text for text in texts)


def agreement():
    exchange, _, meter = make([flat_layout(Matrix("a", (2, 6), ((0, 2),)), Cut.even(12, 2))])
    return len(exchange.routes), meter.calls


def test_ranks_that_agree_do_not_raise():
    assert harness.run(2, agreement) == [(1, {}), (1, {})]


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


def flags(values):
    meter = Meter()
    mine = torch.tensor(values[dist.get_rank()])
    return collectives.any_rank(mine, (dist.group.WORLD,), meter), meter.calls


@pytest.mark.parametrize("values", [(False, False), (True, False), (False, True)])
def test_any_rank(values):
    assert harness.run(2, flags, values) == [(any(values), {"all_reduce": 1})] * 2


def test_any_rank_alone():
    meter = Meter()
    for groups in ((), (None,), (None, None)):
        assert collectives.any_rank(torch.tensor(True), groups, meter) is True
        assert collectives.any_rank(torch.tensor(False), groups, meter) is False
    assert meter == Meter()


def flag_on(which):
    meter = Meter()
    mine = torch.tensor(dist.get_rank() == which)
    return collectives.any_rank(mine, grid(2, 2, False), meter), meter.calls


@pytest.mark.parametrize("which", [0, 1, 2, 3, None])
def test_any_rank_of_shards_and_replicas(which):
    assert harness.run(4, flag_on, which) == [(which is not None, {"all_reduce": 2})] * 4
