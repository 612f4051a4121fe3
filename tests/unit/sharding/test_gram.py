"""Strategy ``gram``: steps of matrices that stay in slabs, against the same in one process."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from tests.support import harness, sharded_model
from tests.unit.sharding.slab_cuts import SHAPES, cuts

# -- equal to one process


def trial(kind, ranks, replicas, optimizer, options, count=3, make=sharded_model.gradient):
    """Largest difference from one process; calls of this rank and of it."""
    if ranks * replicas == 4 and kind == "tp_flat":
        here = sharded_model.ShardedModel(
            cuts(kind, 2), optimizer, 4, 1, strategy="gram", **options
        )
    else:
        here = sharded_model.ShardedModel(
            cuts(kind, ranks), optimizer, ranks, replicas, strategy="gram", **options
        )
    alone_options = {k: v for k, v in options.items() if k != "replicate_momentum"}
    alone = sharded_model.ShardedModel(sharded_model.whole(SHAPES), optimizer, **alone_options)
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


# -- what it costs


def bytes_sent(ranks, count, in_place):
    shape = (8, 30)
    along = 1 if in_place else 0
    found = {f"w{i}": (shape, sharded_model.strips(shape, ranks, along)) for i in range(count)}
    here = sharded_model.ShardedModel(found, ranks=ranks, strategy="gram", check_finite=False)
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


# -- who asks for whole matrices


def reports(strategy, folder):
    from spectral_dist.monitor import Monitor, to_jsonl

    found = cuts("columns", 2)
    here = sharded_model.ShardedModel(found, "ROOT", 2, 1, strategy=strategy, quantile=0.75)
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
    here = sharded_model.ShardedModel(cuts("columns", 2), "Muon", 2, 1, strategy=strategy)
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
        sharded_model.ShardedModel(sharded_model.whole(SHAPES), strategy="gram").step(0)
    return [str(w.message) for w in found]


def test_nothing_to_share_is_said():
    assert any("strategy 'gram' has no effect on wide" in text for text in warned())
