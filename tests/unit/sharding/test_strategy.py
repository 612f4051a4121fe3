"""Which strategy a matrix gets: by what it costs, by what was asked for, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import spectral_dist
from spectral_dist.core import strategy
from spectral_dist.machine import Machine
from spectral_dist.rules.muon import Muon, MuonOptions
from spectral_dist.rules.polargrad import PolarGrad, PolarGradOptions
from spectral_dist.rules.root import ROOT, ROOTOptions
from spectral_dist.rules.sumo import SUMO, SUMOOptions
from spectral_dist.sharding.cost import (
    CostContext,
    cheaper_in_slabs,
    gram_seconds,
    owner_seconds,
    subspace_seconds,
)
from spectral_dist.sharding.plan import gram_bucket_elements, make_plan
from tests.support import harness, sharded_model

HUGE = (2048, 131072)
JOB = CostContext(ranks=8, replicas=1, steps=5, itemsize=2, half=True, gram_itemsize=4)


def tiled(count, shape, ranks=8, along=1, named=True):
    parts = sharded_model.strips(shape, ranks, along)
    if not named:
        for part in parts:
            part.block = 0
    return [sharded_model.layout(f"w{i}", parts, shape, 0, i) for i in range(count)]


def choose(layouts, machine=None, job=JOB, able=True):
    return cheaper_in_slabs(layouts, [able] * len(layouts), job, machine or Machine())


def test_few_long_matrices_stay_in_slabs_and_many_find_owners():
    assert choose(tiled(1, HUGE)) == [True]
    assert choose(tiled(3, HUGE)) == [True] * 3
    assert choose(tiled(64, (1024, 4096))) == [False] * 64
    assert choose(tiled(1, (64, 256))) == [False]  # two collectives more


def test_slow_networks_favour_grams_and_slow_wide_products_owners():
    few = tiled(8, (2048, 32768))
    assert choose(few, Machine(bandwidth=1e9)) == [True] * 8
    assert choose(few, Machine(flops_wide=1e11)) == [False] * 8


def test_auto_leaves_what_does_not_lie_in_slabs_or_is_not_able():
    assert choose(tiled(1, HUGE, along=0)) == [False]
    assert choose(tiled(1, HUGE, named=False)) == [False]  # FSDP2 by columns: bitwise as ever
    assert choose(tiled(1, HUGE), able=False) == [False]


def test_seconds_by_hand():
    machine = Machine(bandwidth=10.0, latency=1.0, flops=100.0, flops_wide=50.0)
    job = CostContext(ranks=2, replicas=1, steps=3, itemsize=2, half=True, gram_itemsize=4)
    # s = 2, l = 10: two of three at one owner; 3 steps of 4 (20 + 2); 20 elements in and out
    assert owner_seconds((2, 10), 3, job, machine) == pytest.approx(2 * (3 * 88 / 100 + 8) + 2)
    products, polynomials = 3 * 2 * 4 * 10 / 2, 2 * 3 * 32
    sent = 3 * 0.5 * 6 * 4
    still = (products + polynomials) / 50 + sent / 10 + 4
    assert gram_seconds((10, 2), 3, True, job, machine) == pytest.approx(still)
    flips = 2 * 0.5 * 3 * 20 / 2 * 2
    assert gram_seconds((2, 10), 3, False, job, machine) == pytest.approx(still + flips / 10)
    # rank 1: two of three at one owner, in and out; or 1 x 2 numbers of each there and back
    found = subspace_seconds((10, 2), 1, 3, job, machine)
    assert found == pytest.approx((2 * 2 * 20 * 2 / 10 + 2, 2 * 0.5 * 3 * 2 * 2 / 10 + 2))


RULES = {MuonOptions: Muon, PolarGradOptions: PolarGrad, ROOTOptions: ROOT, SUMOOptions: SUMO}


def selected(cls, layouts, wire, observed=False, **given):
    """What is done in slabs of layouts over all ranks."""
    options, rule = cls.from_user(given), RULES[cls]()
    shapes = {layout.matrix.name: layout.matrix.shape for layout in layouts}
    if cls is ROOTOptions:
        options = replace(options, coefficients={"2048x131072": [3.4445, -4.775, 2.0315]})
    specs = {shape: rule.polar(options, shape) for shape in shapes.values()}
    (located,) = sharded_model.Placed(layouts, dist.group.WORLD, None, False).locate({}, [], [])
    observed = observed or rule.pooling(options) is not None
    return strategy.select_gram(options, specs, located, wire, observed)


def chosen(cls, given, observed=False, dtype="bfloat16"):
    try:
        return selected(cls, tiled(1, HUGE, 2), getattr(torch, dtype), observed, **given)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("cls", "given", "observed", "wanted"),
    [
        (MuonOptions, {"polar_dtype": "bfloat16"}, False, True),
        (MuonOptions, {"polar_dtype": "bfloat16", "strategy": "owner"}, False, False),
        (MuonOptions, {"polar_dtype": "bfloat16"}, True, False),
        (MuonOptions, {"polar": "svd"}, False, False),
        (MuonOptions, {"polar": "zolo"}, False, False),
        (MuonOptions, {"polar_dtype": "bfloat16", "machine": {"flops_wide": 1e9}}, False, False),
        (MuonOptions, {"polar_dtype": "bfloat16", "polar_steps": 30}, False, False),
        (PolarGradOptions, {}, False, True),
        (PolarGradOptions, {"polar_dtype": "float64"}, False, False),
        (ROOTOptions, {}, False, True),
        (ROOTOptions, {"adapt_every": 5}, False, False),
        (ROOTOptions, {"strategy": "gram"}, False, True),
        (SUMOOptions, {"rank": 256}, False, True),
        (SUMOOptions, {"rank": 256}, True, False),
        (SUMOOptions, {"rank": 256, "strategy": "owner"}, False, False),
    ],
)
def test_auto_and_forced(cls, given, observed, wanted):
    assert harness.run(2, chosen, cls, given, observed) == [[wanted]] * 2


def sumo(ranks, shape, along, rank, asked):
    """(what SUMO does of 16 matrices that lie in strips, the warnings)."""
    layouts = tiled(16, shape, ranks, along)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        chosen = selected(SUMOOptions, layouts, torch.float32, rank=rank, strategy=asked)
    assert len(set(chosen)) == 1
    return chosen[0], [str(w.message) for w in found]


def test_sumo_stays_in_slabs_where_less_travels():
    """Of matrices of 64 x 64 on 4 ranks: 3/4 r x 64 numbers of each, or a fourth of them whole."""
    assert harness.run(4, sumo, 4, (64, 64), 0, 21, "auto") == [(True, [])] * 4
    assert harness.run(4, sumo, 4, (64, 64), 0, 22, "auto") == [(False, [])] * 4
    assert harness.run(4, sumo, 4, (64, 128), 1, 42, "auto") == [(True, [])] * 4


def test_sumo_and_square_matrices_cut_by_columns():
    """The basis is one of the rows under every layout, so such slabs are no use; it is said."""
    assert harness.run(2, sumo, 2, (64, 64), 1, 4, "auto") == [(False, [])] * 2
    for chosen, texts in harness.run(2, sumo, 2, (64, 64), 1, 4, "gram"):
        assert not chosen
        assert "w0, w1, w2 (16 matrices) are square and cut by columns" in texts[0]


def test_forced_in_float64():
    """The dtype is known where the parameters are."""
    given = {"strategy": "gram"}
    for text in harness.run(2, chosen, PolarGradOptions, given, dtype="float64"):
        assert "polar is 'qdwh' in float64" in text
        assert "polar_dtype='float32'" in text
        assert "strategy='owner'" in text


@pytest.mark.parametrize(
    ("cls", "given", "match"),
    [
        (
            MuonOptions,
            {"strategy": "slabs"},
            "strategy is 'slabs'.*Known: auto, block, gram, owner",
        ),
        (MuonOptions, {"strategy": "local"}, "strategy is 'local'"),
        (MuonOptions, {"strategy": "gram", "polar": "zolo"}, "polar is 'zolo'.*polar='qdwh'"),
        (MuonOptions, {"strategy": "gram", "polar": "svd"}, "polar is 'svd'.*strategy='owner'"),
        (MuonOptions, {"strategy": "gram", "polar_steps": 20}, "fewer polar_steps.*'owner'"),
        (MuonOptions, {"block_period": 3}, "block_period is 3.*strategy='block' only"),
        (MuonOptions, {"strategy": "block", "block_period": 0}, "block_period is 0.*whole number"),
        (MuonOptions, {"strategy": "block", "block_period": 2.0}, "block_period is 2.0"),
        (MuonOptions, {"strategy": "block", "block_period": True}, "block_period is True"),
        (MuonOptions, {"machine": {"flop": 1.0}}, "machine: unknown number 'flop'. Known: band"),
        (MuonOptions, {"machine": {"flops": "1"}}, "machine: flops is '1'; it must be a number"),
        (MuonOptions, {"machine": {"flops": 0}}, "flops is 0"),
        (MuonOptions, {"machine": 3}, "machine is 3; write numbers by name"),
        (ROOTOptions, {"strategy": "block"}, "whole matrices; write 'owner' or 'gram'"),
        (ROOTOptions, {"strategy": "gram", "adapt_every": 2}, "write 'owner', or adapt_every=0"),
    ],
)
def test_what_is_refused(cls, given, match):
    with pytest.raises(ValueError, match=match):
        cls.from_user(given)


def test_a_group_of_its_own_has_no_strategy():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 3))], "machine": {}}]
    with pytest.raises(ValueError, match=r"machine|tag"):
        spectral_dist.Muon(groups)


# -- the plan


def test_strategies_of_a_plan():
    layouts = [
        *tiled(2, (8, 24), 4),
        sharded_model.layout("x", sharded_model.strips((3, 4), 1, 0), (3, 4), 0, 2),
    ]
    plan = make_plan(layouts, 4, 1 << 30, gram=[True, False, True])
    assert plan.strategies == ("gram", "owner", "local")
    assert make_plan(layouts, 4, 1 << 30).strategies == ("owner", "owner", "local")


@pytest.mark.parametrize("replicas", [1, 2])
def test_polynomials_of_a_bucket_are_spread(replicas):
    plan = make_plan(tiled(16, (8, 24), 4), 4, 1 << 30, replicas, gram=[True] * 16)
    (bucket,) = plan.buckets
    assert bucket.gram
    assert not bucket.moves
    assert sorted(map(len, bucket.matrices.values())) == [16 // (4 * replicas)] * (4 * replicas)
    assert set(plan.loads) == {16 // (4 * replicas) * 4.0 * 8**3}


def test_buckets_of_slabs_respect_the_bound():
    layouts = [*tiled(6, (8, 24), 2), *tiled(5, (4, 40), 2)]
    for numel in (1, 400, 1000, 1 << 30):
        plan = make_plan(layouts, 2, numel, gram=[True] * 11)
        for bucket in plan.buckets:
            inside = [i for found in bucket.matrices.values() for i in found]
            size = sum(gram_bucket_elements(layouts[i].matrix.shape, 2) for i in inside)
            assert size <= numel or len(inside) == 1
        seen = [i for b in plan.buckets for found in b.matrices.values() for i in found]
        assert sorted(seen) == list(range(11))


def disagreeing():
    """One rank forces gram."""
    forced = dist.get_rank() == 1
    here = sharded_model.ShardedModel(
        {"w": ((4, 12), sharded_model.strips((4, 12), 2, 1))}, "Muon", 2, 1,
        strategy="gram" if forced else "owner",
    )  # fmt: skip
    try:
        here.step(0)
    except RuntimeError as error:
        return str(error)
    return "none"


def test_ranks_that_disagree_on_the_strategy_say_so():
    for text in harness.run(2, disagreeing):
        assert "`strategy 'owner'` on rank 0 but `strategy 'gram'` on rank 1" in text


def test_required_replicas():
    """Blocks are done in the replica of their matrix."""
    layouts = tiled(6, (8, 24), 2)
    plan = make_plan(layouts, 2, 1 << 30, 2, required_replicas=[0, 0, 0, 0, 1, 1])
    assert [owner // 2 for owner in plan.owners] == [0, 0, 0, 0, 1, 1]
    assert plan.loads[0] == plan.loads[1]


def test_a_machine_where_there_is_no_choice_is_said():
    model = torch.nn.Linear(6, 4)
    model.weight.grad = torch.ones_like(model.weight)
    model.bias.grad = torch.ones_like(model.bias)
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), machine={"flops": 1e12})
    with pytest.warns(UserWarning, match="machine has no effect on weight and those that lie"):
        optimizer.step()
