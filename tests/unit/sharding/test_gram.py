"""Strategy ``gram``: matrices that stay in slabs against the same in one process."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.polar import of_gram, polar, reductions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.boxes import Box, Slabs, intersect, slabs
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.exchange import Exchange, MatrixTask
from spectral_dist.sharding.gram import Reduction, fold, unfold
from spectral_dist.sharding.layout import Cut, Tile
from spectral_dist.sharding.plan import make_plan
from spectral_dist.sharding.slabs import SlabBatch
from tests.reference import polar as reference
from tests.reference.layouts import UNTOUCHED, random_world
from tests.support import harness, sharded_model

SHAPES = {"wide": (12, 40), "wide2": (12, 40), "tall": (44, 10), "square": (16, 16), "row": (1, 9)}


# -- the way to slabs and back, of anything that can be laid out


class Task(MatrixTask):
    """What must arrive in every slab, and something that comes back misplaced if it does."""

    def __init__(self, world, exchange, ranks, rank):
        self.world, self.ranks, self.rank = world, ranks, rank
        self.inputs = exchange.local_runs.views(world.mine)
        self.outputs = [torch.full_like(t, UNTOUCHED) for t in world.mine]
        self.targets = exchange.local_runs.views(self.outputs)
        self.seen = 0

    def update_input(self, pieces):
        return [self.inputs[piece] for piece in pieces]

    def direction(self, matrices, which):
        assert all(len(self.world.layouts[i].holders()) == 1 for i in which)
        return matrices + 1

    def slab_direction(self, x, reduction):
        for k, i in enumerate(reduction.matrices):
            box = slabs(self.world.layouts[i], self.ranks).box(self.rank, reduction.shape)
            whole = self.world.truths[i].whole
            there = whole[box.row : box.row + box.rows, box.col : box.col + box.cols]
            assert torch.equal(x[k], there)
        self.seen += len(reduction.matrices)
        return x + 1

    def apply(self, pieces, directions):
        for piece, part in zip(pieces, directions, strict=True):
            self.targets[piece].copy_(part)


def there_and_back(ranks, replicas, seed):
    moved = 0
    for count in range(30):
        group, copies = sharded_model.grid(ranks, replicas)
        rank = collectives.rank(group)
        world = random_world(seed + count, ranks, rank, largest=1 << 20)
        numel = (1, 200, 1 << 30)[count % 3]
        plan = make_plan(world.layouts, ranks, numel, replicas, gram=[True] * len(world.layouts))
        cut = [len(x.holders()) > 1 for x in world.layouts]
        assert plan.strategies == tuple("gram" if c else "local" for c in cut)
        exchange = Exchange(
            world.layouts, plan, group=group, replicas=copies, device=torch.device("cpu"),
            like=torch.empty(0), wire_dtype=torch.float32, meter=Meter(),
        )  # fmt: skip
        task = Task(world, exchange, ranks, rank)
        exchange.run(task)
        replica = collectives.rank(copies)
        mine = [o // ranks == replica and c for o, c in zip(plan.owners, cut, strict=True)]
        assert task.seen == sum(mine)
        for truth in world.truths:
            truth.direction.copy_(truth.whole + 1)
        for out, wanted in zip(task.outputs, world.expected(), strict=True):
            assert torch.equal(out, wanted)
        moved += task.seen
    return moved


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_any_layout_reaches_its_slabs_and_returns(ranks, replicas):
    assert sum(harness.run(ranks * replicas, there_and_back, ranks, replicas, 40)) > 20


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_run_of_a_tile_meets_a_box_in_at_most_three(rows, cols, data):
    tile = Tile(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)), rows, cols, Cut((0,)),
                0)  # fmt: skip
    begin, end = sorted(data.draw(st.integers(0, rows * cols)) for _ in range(2))
    box = Box(*(data.draw(st.integers(0, 6)) for _ in range(4)))
    found = list(intersect(tile, begin, end, box))
    assert len(found) <= 3
    cells = [(b.row + i, b.col + j) for b in found for i in range(b.rows) for j in range(b.cols)]
    run = [(tile.row + e // cols, tile.col + e % cols) for e in range(begin, end)]
    inside = [
        (r, c)
        for r, c in run
        if box.row <= r < box.row + box.rows and box.col <= c < box.col + box.cols
    ]
    assert cells == inside


@pytest.mark.parametrize(
    ("parts", "shape", "along", "ranges", "in_place"),
    [
        (
            sharded_model.strips((4, 12), 3, 1, [0, 5, 5, 12]),
            (4, 12),
            1,
            ((0, 5), (0, 0), (5, 12)),
            True,
        ),
        (
            sharded_model.strips((12, 4), 3, 0, [0, 1, 9, 12]),
            (12, 4),
            0,
            ((0, 1), (1, 9), (9, 12)),
            True,
        ),
        (sharded_model.strips((4, 12), 2, 1, groups=2), (4, 12), 1, ((0, 6), (6, 12)), True),
        (sharded_model.strips((6, 6), 2, 0), (6, 6), 0, ((0, 3), (3, 6)), True),
        (sharded_model.strips((6, 6), 2, 1), (6, 6), 1, ((0, 3), (3, 6)), True),
        (sharded_model.strips((4, 12), 3, 0), (4, 12), 1, ((0, 4), (4, 8), (8, 12)), False),
        (sharded_model.strips((7, 4), 2, 1), (7, 4), 0, ((0, 3), (3, 7)), False),
        (sharded_model.flat((4, 12), 3), (4, 12), 1, ((0, 4), (4, 8), (8, 12)), False),
        # runs that are whole rows lie still, whoever cut them
        ([sharded_model.Part(0, 0, 6, 2, (0, 4, 12), (1, 0))], (6, 2), 0, ((2, 6), (0, 2)), True),
    ],
)
def test_slabs_are_as_the_matrix_lies_if_it_can_be(parts, shape, along, ranges, in_place):
    found = slabs(sharded_model.layout("w", parts, shape, 0, 0), len(ranges))
    assert (found.along, found.ranges, found.in_place) == (along, ranges, in_place)


def test_halves_of_symmetric_matrices():
    for s in range(1, 9):
        r = torch.randn(3, s, s)
        r = r + r.mT
        half = fold(r)
        assert half.shape == (3, s * (s + 1) // 2)
        assert torch.equal(half.sort().values[0], r[0][torch.ones(s, s).triu() > 0].sort().values)
        assert torch.equal(unfold(half, s), r)


# -- equal to one process


def cuts(kind, ranks, shapes=None):
    """name -> (shape, parts), of each kind of cut."""
    found = {}
    for name, shape in (shapes or SHAPES).items():
        along = int(kind == "columns")
        if kind == "uneven":
            along = int(shape[1] > shape[0])
            size = shape[along]
            edges = [0, *([1] * (ranks > 2)), *[size // 3] * (ranks - 1 - (ranks > 2)), size]
            parts = sharded_model.strips(shape, ranks, along, edges)
        elif kind == "flat":
            parts = sharded_model.flat(shape, ranks)
        elif kind == "tp_flat":
            parts = sharded_model.tp_flat(shape, int(shape[0] == 1 or name == "tall"))
        elif kind == "groups":
            parts = sharded_model.strips(
                shape, ranks, int(shape[1] > shape[0]), groups=min(2, shape[0])
            )
        else:
            parts = sharded_model.strips(shape, ranks, along)
        found[name] = (shape, parts)
    return found


def trial(kind, ranks, replicas, optimizer, options, count=3, make=sharded_model.gradient):
    """Largest difference from one process; calls of this rank and of it."""
    if ranks * replicas == 4 and kind == "tp_flat":
        here = sharded_model.Trial(cuts(kind, 2), optimizer, 4, 1, strategy="gram", **options)
    else:
        here = sharded_model.Trial(
            cuts(kind, ranks), optimizer, ranks, replicas, strategy="gram", **options
        )
    alone_options = {k: v for k, v in options.items() if k != "replicate_momentum"}
    alone = sharded_model.Trial(sharded_model.whole(SHAPES), optimizer, **alone_options)
    for step in range(count):
        here.step(step, make)
        alone.step(step, make)
    assert set(here.unit.plan.strategies) <= {"gram", "local"}
    assert here.unit.plan.strategies.count("gram") >= 4
    return here.difference(alone), here.optimizer.polar_calls, alone.optimizer.polar_calls


def check(world, *args, bound=1e-6, **more):
    results = harness.run(world, trial, *args, **more)
    assert max(difference for difference, *_ in results) < bound
    # the polynomial of each matrix once in the whole job
    assert sum(calls for _, calls, _ in results) == results[0][2]


KINDS = ("rows", "columns", "uneven", "flat", "groups")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_muon_equals_one_process(kind, ranks):
    check(ranks, kind, ranks, 1, "Muon", {})


@pytest.mark.parametrize("kind", ["rows", "columns", "flat"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_with_replicas(kind, everywhere):
    check(4, kind, 2, 2, "Muon", {"replicate_momentum": everywhere})


def test_flat_runs_of_tiles():
    check(4, "tp_flat", 4, 1, "Muon", {})


@pytest.mark.parametrize(
    "options",
    [
        {"polar": "polar_express"},
        {"polar": "gram_jordan"},
        {"polar": [[3.0, -3.2, 1.2], [1.875, -1.25, 0.375]], "polar_steps": 6},
        {"polar": "deepseekv4"},
        {"polar": "cans", "polar_dtype": "float64"},  # in float32 the direct form is off
        {"polar": "eigh"},
        {"bucket_mb": 0.001},
        {"polar_dtype": "float64", "polar": "jordan"},
    ],
)
def test_methods(options):
    check(2, "columns", 2, 1, "Muon", options)


@pytest.mark.parametrize("options", [{}, {"polar_first": True}, {"polar": "polar_express"}])
def test_polargrad(options):
    check(2, "rows", 2, 1, "PolarGrad", options, bound=2e-6 * 20)  # steps are that long


def test_polargrad_polar_first_with_replicas():
    for options in ({"polar_first": True}, {"polar_first": True, "replicate_momentum": True}):
        check(4, "columns", 2, 2, "PolarGrad", options, bound=2e-6 * 20)


@pytest.mark.parametrize("kind", ["columns", "flat"])
def test_root(kind):
    check(2, kind, 2, 1, "ROOT", {"quantile": 0.8})


def resumed_small(scale):
    """Steps of gradients that are tiny, huge or zero: the factor does not depend on it."""

    def make(shape, step, name, dtype):
        return sharded_model.gradient(shape, step, name, dtype) * (scale if step else 0.0)

    return trial("columns", 2, 1, "Muon", {}, make=make)


@pytest.mark.parametrize("scale", [1e-38, 1e-44, 1e30, 0.0])
def test_the_scale_of_gradients_does_not_matter(scale):
    for difference, *_ in harness.run(2, resumed_small, scale):
        assert difference < 1e-6


# -- accuracy, against float64


def decaying(kind, s, long, seed=0):
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(s, dtype=torch.float64)
    sigma = (1 + i) ** -1.5 if kind == "power" else 10 ** (-6 * i / s)
    u, v = (
        torch.linalg.qr(torch.randn(n, s, generator=generator, dtype=torch.float64))[0]
        for n in (s, long)
    )
    return (u * sigma) @ v.T


def alone_batch(shape, ranks, rank, count=1, along=1):
    edges = sharded_model.even(shape[along], ranks)
    ranges = tuple((edges[r], edges[r + 1]) for r in range(ranks))
    cut = Slabs(along, ranges, True)
    owners = tuple(sorted(k % ranks for k in range(count)))
    return SlabBatch(tuple(range(count)), owners, shape, cut, cut.box(rank, shape))


def slab_of(x, batch):
    b = batch.box
    return x[..., b.row : b.row + b.rows, b.col : b.col + b.cols].contiguous()


def bf16_partial_grams(x, rows, group):
    """What others do: every step all-reduces the bfloat16 Gram of what each rank holds."""
    norm = x.float().square().sum()
    dist.all_reduce(norm, group=group)
    x = (x.float() / norm.sqrt()).bfloat16()
    for a, b, c in rows:
        g = (x @ x.mT).float()
        dist.all_reduce(g, group=group)
        g = g.bfloat16()
        x = a * x + (b * g + c * (g @ g)) @ x
    return x


def errors(spectrum, name, dtype):
    """Of gram, of the direct form in the same dtype, of the bfloat16 partial sums."""
    dtype = getattr(torch, dtype)
    group, _ = sharded_model.grid(2, 1)
    x = decaying(spectrum, 48, 384)
    wire = x.to(dtype)
    wanted = reference.newton_schulz(name, 5, wire.double())
    meter = Meter()
    batch = alone_batch(tuple(x.shape), 2, dist.get_rank())
    mine = slab_of(wire, batch)
    wide = of_gram.gram_dtype(name, 5, dtype)
    found = Reduction(batch, group, meter).multiply(
        mine[None], wide, lambda r: of_gram.multiplier(r, name, 5)
    )[0]
    here = slab_of(wanted, batch)
    direct = slab_of(polar(wire, method=name, steps=5, compute_dtype=dtype), batch)
    others = [direct]
    if dtype is torch.bfloat16 and name == "jordan":
        others.append(bf16_partial_grams(mine, [(3.4445, -4.7750, 2.0315)] * 5, group))
    return [((f.double() - here).norm() / here.norm()).item() for f in (found, *others)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spectrum", ["power", "exponential"])
@pytest.mark.parametrize("name", ["jordan", "polar_express"])
def test_no_less_accurate_than_the_direct_form(spectrum, name, dtype):
    for gram, *others in harness.run(2, errors, spectrum, name, dtype):
        assert all(gram <= other for other in others), (gram, others)


def missing_rank():
    group, _ = sharded_model.grid(2, 1)
    found = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator) @ torch.randn(4, 200, generator=generator)
    batch = alone_batch((40, 200), 2, dist.get_rank())
    for name, steps, dtype in (("deepseekv4", 10, "bfloat16"), ("jordan", 12, "float32"),
                               ("qdwh", None, "float32")):  # fmt: skip
        wide = of_gram.gram_dtype(name, steps, getattr(torch, dtype))
        u = Reduction(batch, group, Meter()).multiply(
            slab_of(x, batch)[None], wide, lambda r, n=name, s=steps: of_gram.multiplier(r, n, s)
        )[0]
        gram = u @ u.mT
        dist.all_reduce(gram, group=group)
        found.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()[[0, 3, 4]].tolist())
    return found


def test_missing_rank_stays_missing():
    """A float32 Gram would make NaN of deepseekv4: such schedules get float64."""
    for results in harness.run(2, missing_rank):
        for first, last, beyond in results:
            assert 0.6 < last <= first < 1.3
            assert beyond < 0.05  # 12 steps of jordan raise 2e-8 by 3e6


def test_methods_that_need_the_matrix():
    for method, dtype in (("zolo", torch.float64), ("svd", torch.float32), ("qdwh", torch.float64)):
        with pytest.raises(
            ValueError, match=f"polar is '{method}'.*needs the matrix.*polar='qdwh'"
        ):
            of_gram.gram_dtype(method, None, dtype)
    with pytest.raises(ValueError, match=r"jordan' of 20 steps.*fewer polar_steps"):
        of_gram.gram_dtype("jordan", 20, torch.float32)
    assert of_gram.gram_dtype("jordan", 5, torch.bfloat16) == torch.float32
    assert of_gram.gram_dtype("deepseekv4", None, torch.bfloat16) == torch.float64
    assert of_gram.gram_dtype("jordan", 5, torch.float32) == torch.float64


def bad_values(value):
    group, _ = sharded_model.grid(2, 1)
    batch = alone_batch((4, 10), 2, dist.get_rank(), 2)
    x = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    x[1, 0, 0] = value
    found = []
    for method in ("jordan", "eigh"):
        u = Reduction(batch, group, Meter()).multiply(
            slab_of(x, batch), torch.float64, lambda r, m=method: of_gram.multiplier(r, m, None)
        )
        found.append((u[0].isfinite().all().item(), u[1].isnan().all().item()))
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_in_their_matrix_and_hang_nobody(value):
    assert harness.run(2, bad_values, value) == [[(True, True)] * 2] * 2


# -- what it costs


def bytes_sent(ranks, count, in_place):
    shape = (8, 30)
    along = 1 if in_place else 0
    found = {f"w{i}": (shape, sharded_model.strips(shape, ranks, along)) for i in range(count)}
    here = sharded_model.Trial(found, ranks=ranks, strategy="gram", check_finite=False)
    here.step(0)
    return dict(here.optimizer.meter.bytes), dict(here.optimizer.meter.calls), here.unit.plan.owners


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_of_slabs_that_lie_still(ranks):
    count = 2 * ranks
    for sent, calls, _ in harness.run(ranks, bytes_sent, ranks, count, True):
        # (P - 1)/P k s (s + 1) numbers of float64, half there and half back
        assert sum(sent.values()) * ranks == (ranks - 1) * count * 8 * 9 * 8
        assert sent["all_to_all"] == sent["all_gather"]
        assert calls == {"all_to_all": 1, "all_gather": 1}


def test_bytes_of_a_batch_that_does_not_divide():
    for rank, (sent, calls, owners) in enumerate(harness.run(2, bytes_sent, 2, 3, True)):
        own = owners.count(rank)
        assert {own, 3 - own} == {1, 2}
        assert sent == {"all_to_all": 8 * 36 * ((3 - own) + own)}
        assert calls == {"all_to_all": 2}


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_of_slabs_that_must_move(ranks):
    count = ranks
    edges, columns = sharded_model.even(8, ranks), sharded_model.even(30, ranks)
    for rank, (sent, calls, _) in enumerate(harness.run(ranks, bytes_sent, ranks, count, False)):
        rows, cols = edges[rank + 1] - edges[rank], columns[rank + 1] - columns[rank]
        # out: my rows but for my columns; back: my columns but for my rows
        flips = 4 * count * (rows * (30 - cols) + cols * (8 - rows))
        assert sent["all_to_all"] + sent["all_gather"] == flips + (
            (ranks - 1) * count * 8 * 9 * 8 // ranks
        )
        assert calls == {"all_to_all": 3, "all_gather": 1}


# -- reductions


def quantiles(cases):
    group, _ = sharded_model.grid(2, 1)
    wrong = []
    for number, (values, shape, dtype, along, edges) in enumerate(cases):
        x = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)).view(-1, *shape)
        ranges = ((0, edges), (edges, shape[along]))
        cut = Slabs(along, ranges, True)
        batch = SlabBatch(tuple(range(len(x))), (0,) * len(x), shape, cut,
                          cut.box(dist.get_rank(), shape))  # fmt: skip
        mine = slab_of(x.abs(), batch)
        for q in (0, 0.1, 0.5, 0.9, 0.999, 1):
            found = Reduction(batch, group, Meter()).quantile(mine, q)
            if not torch.equal(found, reductions.quantile(x.abs(), q)):
                wrong.append((number, q, found, reductions.quantile(x.abs(), q)))
    return wrong


numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3e-42, 1e-39, 1.1, 1e30, math.pi])


@st.composite
def quantile_case(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    count = draw(st.integers(1, 3))
    size = shape[0] * shape[1] * count
    values = draw(st.lists(numbers | st.floats(-1e3, 1e3, width=32), min_size=size, max_size=size))
    along = draw(st.integers(0, 1))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return values, shape, dtype, along, draw(st.integers(0, shape[along]))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(quantile_case(), min_size=10, max_size=10))
def test_quantiles_are_those_of_the_whole_matrix_bitwise(cases):
    assert harness.run(2, quantiles, cases) == [[], []]


def large_quantile():
    x = torch.randn(2, 64, 300, generator=torch.Generator().manual_seed(3))
    return quantiles([(x.flatten().tolist(), (64, 300), "float32", 1, 77)])


def test_quantiles_of_many_numbers():
    assert harness.run(2, large_quantile) == [[], []]


def reports(strategy, folder):
    from spectral_dist.monitor import Monitor, to_jsonl

    found = cuts("columns", 2)
    here = sharded_model.Trial(found, "ROOT", 2, 1, strategy=strategy, quantile=0.75)
    path = f"{folder}/{strategy}.jsonl"
    here.optimizer.monitor = Monitor(1, [to_jsonl(path)])
    here.step(0)
    here.step(1)
    return path


def test_the_monitor_sees_whole_matrices(tmp_path):
    read = {}
    for strategy in ("owner", "gram"):
        path = harness.run(2, reports, strategy, str(tmp_path))[0]
        with open(path, encoding="utf-8") as file:
            read[strategy] = [json.loads(line) for line in file]
    for a, b in zip(read["owner"], read["gram"], strict=True):
        for quantity, by_name in a.items():
            if isinstance(by_name, dict):
                assert b[quantity] == pytest.approx(by_name, rel=2e-4, abs=1e-6), quantity


def observed(strategy):
    here = sharded_model.Trial(cuts("columns", 2), "Muon", 2, 1, strategy=strategy)
    here.step(0)
    here.optimizer.observers.append(lambda names, matrices: None)
    before = {n: p.detach().clone() for n, p in here.weights.items()}
    try:
        here.step(1)
    except ValueError as error:
        assert all(torch.equal(before[n], p) for n, p in here.weights.items())
        return str(error)
    return "none"


@pytest.mark.parametrize("strategy", ["gram", "block"])
def test_observers_are_refused_before_anything_changes(strategy):
    for text in harness.run(2, observed, strategy):
        assert "strategy='owner'" in text
    assert harness.run(2, observed, "owner") == ["none"] * 2


def warned():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sharded_model.Trial(sharded_model.whole(SHAPES), strategy="gram").step(0)
    return [str(w.message) for w in found]


def test_nothing_to_share_is_said():
    assert any("strategy 'gram' has no effect on wide" in text for text in warned())
