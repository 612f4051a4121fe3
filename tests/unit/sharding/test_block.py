"""Strategy ``block``: tiles alone, the whole matrix every ``block_period``-th step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

from spectral_dist.sharding.boxes import block_layouts
from tests.reference import polar as reference
from tests.support import harness, sharded_model
from tests.support.tiles import run_of

SHAPES = {"wide": (6, 20), "tall": (14, 5), "square": (8, 8)}
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


def slow(kind, ranks, period, count):
    """Muon in float64, every block or the whole of it by itself, written out."""
    found = {}
    start = sharded_model.ShardedModel(sharded_model.whole(SHAPES), **OPTIONS)
    for name, (shape, parts) in cuts(kind, ranks).items():
        w = start.weights[name].detach().double().view(shape)
        m = torch.zeros(shape, dtype=torch.float64)
        whole = (slice(0, shape[0]), slice(0, shape[1]))
        boxes = {}
        for p in parts:
            boxes[p.block] = (slice(p.row, p.row + p.rows), slice(p.col, p.col + p.cols))
        for step in range(count):
            g = sharded_model.gradient(shape, step, name).double()
            m = 0.95 * m + 0.05 * g
            x = 0.05 * g + 0.95 * m
            w = w * (1 - 0.02 * 0.1)
            for box in [whole] if (step + 1) % period == 0 else boxes.values():
                u = reference.newton_schulz("jordan", 5, x[box])
                w[box] -= 0.02 * 0.2 * max(u.shape) ** 0.5 * u
        found[name] = w
    return found


def cuts(kind, ranks):
    found = {}
    for name, shape in SHAPES.items():
        if kind == "tp_flat":
            parts = sharded_model.tp_flat(shape, int(name == "wide"))
        else:
            parts = sharded_model.strips(shape, ranks, int(kind == "columns"))
        found[name] = (shape, parts)
    return found


def steps(kind, ranks, replicas, count, unnamed=False, **options):
    """Largest difference from ``slow``, calls, bytes and calls of the collectives."""
    tp = 2 if kind == "tp_flat" else ranks
    found = cuts(kind, tp)
    if unnamed:
        for _, parts in found.values():
            for part in parts:
                part.block = 0
    here = sharded_model.ShardedModel(
        found, "Muon", ranks, replicas, **{"strategy": "block", **OPTIONS, **options}
    )
    wanted = slow(kind, tp, options.get("block_period", 5), count)
    for step in range(count):
        here.step(step)
    worst = 0.0
    for name, p in here.weights.items():
        there = wanted[name].flatten()[here.places[name]]
        if p.numel():
            worst = max(worst, (p.detach() - there).abs().max().item())
    return worst, here.optimizer.polar_calls, dict(here.optimizer.meter.bytes)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("unnamed", [False, True])
def test_equals_the_reference(kind, unnamed):
    results = harness.run(2, steps, kind, 2, 1, 4, unnamed, block_period=3)
    assert max(worst for worst, *_ in results) < 1e-5
    # six blocks in three steps, three matrices in one
    assert sum(calls for _, calls, _ in results) == 3 * 6 + 3


def test_blocks_stay_where_they_are():
    for _, calls, sent in harness.run(2, steps, "columns", 2, 1, 4, check_finite=False):
        assert calls == 12
        assert sent == {"all_reduce": 4}  # the count of steps, in the first


@pytest.mark.parametrize("everywhere", [False, True])
def test_with_replicas(everywhere):
    options = {"block_period": 2, "replicate_momentum": everywhere}
    results = harness.run(4, steps, "columns", 2, 2, 5, **options)
    assert max(worst for worst, *_ in results) < 1e-5
    assert sum(calls for _, calls, _ in results) == 3 * 6 + 2 * 3


def test_a_block_may_be_cut_in_flat_runs():
    """Tensor parallelism 2 over the distributed optimizer 2."""
    results = harness.run(4, steps, "tp_flat", 4, 1, 4, block_period=2)
    assert max(worst for worst, *_ in results) < 1e-5
    assert sum(calls for _, calls, _ in results) == 2 * 6 + 2 * 3


def compare(first, second, count=4):
    """Whether two strategies have the same bits after some steps."""
    a = sharded_model.ShardedModel(cuts("columns", 2), "Muon", 2, 1, **{**OPTIONS, **first})
    b = sharded_model.ShardedModel(cuts("columns", 2), "Muon", 2, 1, **{**OPTIONS, **second})
    for step in range(count):
        a.step(step)
        b.step(step)
    return all(torch.equal(a.weights[n], b.weights[n]) for n in SHAPES)


def test_period_one_is_owner_bitwise():
    owner = {"strategy": "owner"}
    assert harness.run(2, compare, {"strategy": "block", "block_period": 1}, owner) == [True] * 2
    assert harness.run(2, compare, {"strategy": "block"}, owner) == [False] * 2


def resumed(skip):
    """Going on in mid-period from a state dict equals never having stopped."""
    options = {**OPTIONS, "strategy": "block", "block_period": 3}
    never = sharded_model.ShardedModel(cuts("columns", 2), "Muon", 2, 1, **options)
    for step in range(2):
        never.step(step, skip=skip)
    other = sharded_model.ShardedModel(cuts("columns", 2), "Muon", 2, 1, **options)
    for name, p in other.weights.items():
        p.data = never.weights[name].detach().clone()
    other.optimizer.load_state_dict(copy.deepcopy(never.optimizer.state_dict()))
    seen = []
    for trial in (never, other):
        before = trial.optimizer.polar_calls
        for step in range(2, 5):
            trial.step(step, skip=skip)
            seen.append(trial.optimizer.polar_calls - before)
            before = trial.optimizer.polar_calls
    return all(torch.equal(never.weights[n], other.weights[n]) for n in SHAPES), seen


@pytest.mark.parametrize("skip", [(), ("tall",)])
def test_resumes_in_mid_period(skip):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = harness.run(2, resumed, skip)
    assert [same for same, _ in results] == [True, True]
    totals = [sum(calls) for calls in zip(*(seen for _, seen in results), strict=True)]
    count = 3 - len(skip)
    # the third step is whole; what has no gradient is computed nevertheless
    assert totals == [3, 6, 6, 3, 6, 6] or totals == [count, 2 * count, 2 * count] * 2


def empty_rank():
    """The last rank has nothing of any matrix, and a count that a checkpoint has forgotten."""
    found = {"w": ((4, 12), sharded_model.strips((4, 12), 3, 1, [0, 5, 12, 12]))}
    here = sharded_model.ShardedModel(
        found, "Muon", 3, 1, strategy="block", block_period=2, **OPTIONS
    )
    for step in range(4):
        here.step(step)
        if dist.get_rank() == 2:
            here.optimizer.state[here.weights["w"]]["step"].zero_()
    return here.optimizer.polar_calls


def test_a_rank_without_a_part_agrees_on_the_step():
    assert sum(harness.run(3, empty_rank)) == 2 * 2 + 2


def refused():
    found = {"w": ((4, 13), sharded_model.flat((4, 13), 2))}
    here = sharded_model.ShardedModel(found, "Muon", 2, 1, strategy="block")
    try:
        here.step(0)
    except ValueError as error:
        return str(error)
    return "none"


def test_flat_parts_are_no_blocks():
    for text in harness.run(2, refused):
        assert "w are no rectangles" in text
        assert "write strategy='owner'" in text


def test_blocks_of_a_layout():
    parts = sharded_model.strips((6, 10), 2, 1, [0, 4, 10], groups=2)
    first, second = block_layouts(sharded_model.layout("w", parts, (6, 10), 0, 0))
    assert (first.matrix.name, first.matrix.shape) == ("w@0", (6, 4))
    assert (second.matrix.name, second.matrix.shape) == ("w@1", (6, 6))
    where = [(t.row, t.col, t.rows, t.cols) for t in second.tiles]
    assert where == [(0, 0, 3, 6), (3, 0, 3, 6)]
    # rows of one tile that ranks share
    shared = [sharded_model.Part(0, 0, 6, 4, (0, 8, 24), (1, 0))]
    second, first = block_layouts(sharded_model.layout("w", shared, (6, 4), 0, 0))
    assert (second.matrix.name, second.matrix.shape) == ("w@0", (4, 4))
    assert (first.matrix.name, first.matrix.shape, first.holders()) == ("w@1", (2, 4), [1])
    assert run_of(second.tiles[0], 0) == (0, 16)
    assert run_of(second.tiles[0], 1)[1] == 0
    alone = sharded_model.layout("w", sharded_model.strips((6, 4), 1, 0), (6, 4), 0, 0)
    assert block_layouts(alone) == [alone]
