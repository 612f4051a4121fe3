"""Shards -> owners -> shards over real gloo, against a framework that shards by slicing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.layout import Cut, Layout, Matrix, Tile, lay
from spectral_dist.sharding.plan import make_plan
from tests import harness
from tests.reference.layouts import UNTOUCHED, World, random_world

CPU = torch.device("cpu")
HOME = torch.float64  # in which directions come back
ROUNDS = 40


def direction(whole):
    """Not symmetric in anything: a direction that comes back misplaced is another number."""
    m, n = whole.shape
    return whole + (3 * torch.arange(m)[:, None] + 5 * torch.arange(n)) % 50


def group_here():
    return dist.group.WORLD if dist.is_initialized() else None


def make(layouts, numel=1 << 30, wire=torch.float32):
    group = group_here()
    plan = make_plan(layouts, collectives.size(group), numel)
    meter = Meter()
    exchange = Exchange(
        layouts,
        plan,
        group=group,
        device=CPU,
        home=torch.empty(0, dtype=HOME),
        wire_dtype=wire,
        meter=meter,
    )
    return exchange, plan, meter


def there_and_back(world: World, numel: int, wire: torch.dtype):
    """Every matrix to its owner, and its direction back to where its elements are stored."""
    exchange, plan, meter = make(world.layouts, numel, wire)
    rank = collectives.rank(group_here())
    inputs = exchange.views(world.mine)
    outputs = [torch.full_like(tensor, UNTOUCHED) for tensor in world.mine]
    targets = exchange.views(outputs)
    batches = iter([batch for route in exchange.routes for batch in route.batches])
    owned = []

    def whole(matrices):
        assert matrices.dtype == wire
        for i, matrix in zip(next(batches).matrices, matrices, strict=True):
            assert torch.equal(matrix.float(), world.truths[i].whole), world.layouts[i]
            owned.append(i)
        return torch.stack([direction(matrix.float()) for matrix in matrices])

    def settle(pieces, directions):
        for piece, part in zip(pieces, directions, strict=True):
            assert part.dtype == HOME
            targets[piece].copy_(part)

    exchange.run(lambda pieces: [inputs[piece] for piece in pieces], whole, settle)
    assert sorted(owned) == [i for i, owner in enumerate(plan.owners) if owner == rank]
    for truth in world.truths:
        truth.direction.copy_(direction(truth.whole))
    for mine, wanted in zip(outputs, world.expected(), strict=True):
        assert torch.equal(mine, wanted)
    return plan, meter


def rounds(replicated: bool, wire_name: str, seed: int) -> int:
    wire = getattr(torch, wire_name)
    rank, ranks = collectives.rank(group_here()), collectives.size(group_here())
    largest = 1 << 20 if wire is torch.float32 else 100  # exact in the wire's dtype
    moved = 0
    for number in range(seed, seed + ROUNDS):
        world = random_world(number, ranks, rank, replicated=replicated, largest=largest)
        numel = (1, 30, 1 << 30)[number % 3]
        plan, meter = there_and_back(world, numel, wire)
        if replicated:
            sent = 0
            for bucket in plan.buckets:
                loads = [
                    sum(world.truths[i].whole.numel() for i in bucket.matrices.get(r, ()))
                    for r in range(ranks)
                ]
                sent += (ranks - 1) * max(loads)
            calls = {"all_gather": len(plan.buckets)}
        else:
            sent, buckets = 0, 0
            for truth, owner in zip(world.truths, plan.owners, strict=True):
                sent += truth.held(rank) if owner != rank else 0
                sent += truth.whole.numel() - truth.held(rank) if owner == rank else 0
            for bucket in plan.buckets:
                here = [i for indices in bucket.matrices.values() for i in indices]
                buckets += any(len(world.truths[i].holders.unique()) > 1 for i in here)
            calls = {"all_to_all": 2 * buckets} if buckets else {}
        assert meter.calls == calls
        assert sum(meter.bytes.values()) == sent * wire.itemsize
        moved += sent
    return moved


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shards_reach_their_owner_and_return(ranks, wire):
    assert sum(harness.run(ranks, rounds, False, wire, 100 * ranks)) > 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_replicas_are_gathered_from_their_owners(ranks):
    assert sum(harness.run(ranks, rounds, True, "float32", 100 * ranks)) > 0


def test_alone_nothing_is_sent():
    for seed in range(30):
        world = random_world(seed, 1, 0, replicated=seed % 3 == 0, largest=1 << 20)
        plan, meter = there_and_back(world, (1, 30, 1 << 30)[seed % 3], torch.float32)
        assert set(plan.owners) == {0}
        assert meter == Meter()


def test_rounds_to_the_wire_even_if_nothing_is_sent():
    matrix = Matrix("w", (2, 2), ((0, 2),))
    exchange, _, _ = make([lay(matrix, Cut((0, 4)))], wire=torch.bfloat16)
    seen = []

    def whole(matrices):
        seen.append(matrices[0].float())
        return torch.tensor([[[0.5, 1.001], [1.5, 257.0]]])

    def settle(pieces, directions):
        seen.append(directions[0].float())

    exchange.run(lambda pieces: [torch.tensor([1.0, 1.001, 1.5, 257.0])], whole, settle)
    assert torch.equal(seen[0], torch.tensor([[1.0, 1.0], [1.5, 256.0]]))
    assert torch.equal(seen[1], torch.tensor([0.5, 1.0, 1.5, 256.0]))


def exchange_once(layouts, sizes, numel=1 << 30):
    """Owners, calls and bytes of one exchange of tensors that are all ones."""
    exchange, plan, meter = make(layouts, numel)
    views = exchange.views([torch.ones(size) for size in sizes])
    exchange.run(lambda pieces: [views[p] for p in pieces], lambda whole: whole, lambda *_: None)
    return plan.owners, meter.calls, meter.bytes


def straddling():
    # one buffer of 20 in two halves: a (2 x 3) on rank 0, b (3 x 4) straddles as 4 + 8, c on rank 1
    cut = Cut.even(10, 2)
    shapes = (("a", 2, 3, 0), ("b", 3, 4, 6), ("c", 1, 2, 18))
    layouts = [lay(Matrix(x, (m, n), ((0, m),)), cut, offset=o) for x, m, n, o in shapes]
    return exchange_once(layouts, [10])


def test_bytes_of_a_straddling_matrix():
    # b goes to rank 1, whose load (c: 1 * (4 + 1)) is below rank 0's (a: 4 * (6 + 2)); 4 elements
    # of 4 bytes go there, and 4 come back; a and c cost nothing
    for result in harness.run(2, straddling):
        assert result == ((0, 1, 1), {"all_to_all": 2}, {"all_to_all": 16})


def fully_sharded():
    # a: 4 x 4 as 6 + 6 + 4; the owner of the only matrix is the rank with the most of it, rank 0
    layouts = [lay(Matrix("a", (4, 4), ((0, 4),)), Cut((0, 3, 10, 16)))]
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
        lay(Matrix(f"m{i}", (m, n), ((0, m),)), Cut((0, m * n)), tensor=i, replicated=True)
        for i, (m, n) in enumerate(shapes)
    ]
    return exchange_once(layouts, [6, 6, 4], numel)


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
    (view,) = exchange.views([mine]).values()
    seen, back = [], []

    def settle(pieces, directions):
        back.extend(directions)

    def ten_times(matrices):
        seen.append(matrices.clone())
        return matrices * 10

    exchange.run(lambda pieces: [view], ten_times, settle)
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
            lay(
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


def agreement():
    exchange, _, meter = make([lay(Matrix("a", (2, 6), ((0, 2),)), Cut.even(12, 2))])
    return len(exchange.routes), meter.calls


def test_ranks_that_agree_do_not_raise():
    assert harness.run(2, agreement) == [(1, {}), (1, {})]


def mixed():
    """One matrix that everyone holds and one that is sharded, in one exchange."""
    layouts = [
        lay(Matrix("all", (2, 2), ((0, 2),)), Cut((0, 4)), tensor=0, replicated=True),
        lay(Matrix("part", (2, 4), ((0, 2),)), Cut.even(4, 2), tensor=1),
    ]
    try:
        make(layouts)
    except (ValueError, AssertionError):
        return "refused"
    return "accepted"


def test_replicated_and_sharded_matrices_in_one_exchange_are_refused():
    """Not supported: the sharded ones would be taken for replicas."""
    assert harness.run(2, mixed) == ["refused", "refused"]


def flags(values):
    meter = Meter()
    mine = torch.tensor(values[dist.get_rank()])
    return collectives.any_rank(mine, dist.group.WORLD, meter), meter.calls


@pytest.mark.parametrize("values", [(False, False), (True, False), (False, True)])
def test_any_rank(values):
    assert harness.run(2, flags, values) == [(any(values), {"all_reduce": 1})] * 2


def test_any_rank_alone():
    meter = Meter()
    assert collectives.any_rank(torch.tensor(True), None, meter) is True
    assert collectives.any_rank(torch.tensor(False), None, meter) is False
    assert meter == Meter()
