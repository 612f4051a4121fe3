"""Checkpoints of one process, and replicas on real ranks."""

from __future__ import annotations

import io
import json
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spectral_dist
from tests.reference import training
from tests.support import harness, models
from tests.support.weights import (
    OPTIONS,
    Weights,
    give_gradients,
    mixed_model,
    muon,
    run,
    same,
    values,
)

# -- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopping_and_going_on_changes_no_bit(dtype):
    never = models.build().to(dtype)
    run(never, 6, split={"qkv": 3}, **OPTIONS)
    stopped = models.build().to(dtype)
    optimizer = run(stopped, 3, split={"qkv": 3}, **OPTIONS)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = models.build(seed=1).to(dtype)
    resumed.load_state_dict(saved["model"])
    optimizer = muon(resumed, split={"qkv": 3}, **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        give_gradients(resumed, step)
        optimizer.step()
    assert same(values(never), values(resumed))


def test_groups_of_a_state_dict_are_plain():
    """Frameworks write them as JSON or pickle them without our classes."""
    optimizer = run(models.build(), 1)
    json.dumps(optimizer.state_dict()["param_groups"])


# -- replicas


def local_run(model, count, same_batch, group=None, **options):
    """``count`` steps; returns the optimizer."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    optimizer = spectral_dist.Muon(
        spectral_dist.param_groups(inner, split={"qkv": 3}), process_group=group, **options
    )
    for step in range(count):
        batch = models.tokens(step)
        if not same_batch:
            batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return optimizer


def replicas(bucket_mb, odd, **options):
    """Equal gradients on every rank: (differing parameters, polar calls of both, bytes sent)."""
    options = {**OPTIONS, **options, "bucket_mb": bucket_mb}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the unused weight
        alone, shared = models.build(odd=odd), models.build(odd=odd)
        first = local_run(alone, 4, True, **options)
        second = local_run(shared, 4, True, group=dist.group.WORLD, **options)
    a, b = values(alone), values(shared)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    return different, first.polar_calls, second.polar_calls, dict(second.meter.bytes)


@pytest.mark.parametrize(
    ("ranks", "bucket_mb", "odd"),
    [(1, 64, True), (2, 64, True), (2, 0.01, False), (3, 0.01, True)],
)
def test_replicas_equal_one_process_bitwise(ranks, bucket_mb, odd):
    results = harness.run(ranks, replicas, bucket_mb, odd)
    for different, alone, _, _ in results:
        assert different == []
        assert alone == 4 * (16 if odd else 12)
    # each matrix on one rank, not on every one
    assert sum(result[2] for result in results) == results[0][1]
    if ranks == 1:
        assert results[0][3] == {}
    else:
        assert all(result[2] > 0 and result[3]["all_gather"] > 0 for result in results)


def test_the_wire_is_as_wide_as_the_polar_factor():
    """float16 would overflow before it is normalised, so what it computes travels in float32."""
    sent = {}
    for dtype in ("float32", "bfloat16", "float16"):
        results = harness.run(2, replicas, 64, False, polar_dtype=dtype)
        assert [different for different, *_ in results] == [[], []]
        sent[dtype] = results[0][3]["all_gather"]
    assert sent["float32"] == sent["float16"] == 2 * sent["bfloat16"]


def data_parallel():
    """DDP on different data against one process on all of it: largest differences by kind."""
    alone, shared = models.build(odd=False), models.build(odd=False)
    local_run(alone, 10, True, **OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(shared)
    local_run(wrapped, 10, False, group=dist.group.WORLD, **OPTIONS)
    largest = {True: 0.0, False: 0.0}
    a, b = values(alone), values(shared)
    for name in a:
        kind = training.is_matrix(name)
        largest[kind] = max(largest[kind], (a[name] - b[name]).abs().max().item())
    return largest, {name: w.sum().item() for name, w in b.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_equals_one_process(ranks):
    results = harness.run(ranks, data_parallel)
    for largest, sums in results:
        assert largest[True] < 1e-6
        assert largest[False] < 1e-5
        assert sums == results[0][1]  # replicas do not drift apart


def momenta(ranks_keep_all, wrapped):
    """(names of parameters whose momentum is not one process's, elements kept here, of all)."""
    alone, shared = models.build(odd=False), models.build(odd=False)
    first = local_run(alone, 3, True, **OPTIONS)
    group, model = dist.group.WORLD, shared
    if wrapped:  # the group is then found by itself
        group, model = None, nn.parallel.DistributedDataParallel(shared)
    found = spectral_dist.param_groups(model, split={"qkv": 3})
    second = spectral_dist.Muon(
        found, process_group=group, replicate_momentum=ranks_keep_all, **OPTIONS
    )
    for step in range(3):
        second.zero_grad()
        model(models.tokens(step)).backward()
        second.step()
    different, kept, total = [], 0, 0
    others = dict(shared.named_parameters())
    for name, p in alone.named_parameters():
        if not training.is_matrix(name):
            continue
        one, two = first.state[p]["exp_avg"], second.state[others[name]]["exp_avg"]
        kept, total = kept + two.numel(), total + one.numel()
        if one.shape != two.shape or not torch.equal(one, two):
            different.append(name)
        if not ranks_keep_all and two.numel() == one.numel():
            assert torch.equal(one, two), name  # all of it is here, in its own shape
    return different, kept, total, second.polar_calls


# DDP's mean over two ranks of equal gradients is exact; over three it is rounded
@pytest.mark.parametrize(("ranks", "wrapped"), [(2, False), (3, False), (2, True)])
def test_momentum_is_at_the_owner_alone_unless_asked(ranks, wrapped):
    results = harness.run(ranks, momenta, False, wrapped)
    total = results[0][2]
    assert sum(kept for _, kept, _, _ in results) == total  # each matrix's once
    assert all(0 < kept < total for _, kept, _, _ in results)
    replicated = harness.run(ranks, momenta, True, wrapped)
    assert [(different, kept) for different, kept, _, _ in replicated] == [([], total)] * ranks
    for found in (results, replicated):
        assert sum(calls for *_, calls in found) == 3 * 12


def fewer_matrices_than_ranks():
    model, alone = Weights(a=(4, 6)), Weights(a=(4, 6))
    shared, single = muon(model, process_group=dist.group.WORLD), muon(alone)
    for step in range(2):
        for m, optimizer in ((model, shared), (alone, single)):
            give_gradients(m, step)
            optimizer.step()
    return torch.equal(model.a.weight, alone.a.weight), shared.polar_calls


def test_fewer_matrices_than_ranks():
    results = harness.run(3, fewer_matrices_than_ranks)
    assert [equal for equal, _ in results] == [True] * 3
    assert sorted(calls for _, calls in results) == [0, 0, 2]


def bad_on_one_rank(name):
    model = mixed_model()
    optimizer = muon(model, process_group=dist.group.WORLD)
    before = values(model)
    give_gradients(model, 0)
    if dist.get_rank() == 1:
        dict(model.named_parameters())[name].grad.view(-1)[0] = math.nan
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), same(before, values(model))
    return "no error", False


@pytest.mark.parametrize("name", ["1.weight", "2.bias"])
def test_nan_on_one_rank_is_an_error_on_all(name, monkeypatch):
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    for text, unchanged in harness.run(2, bad_on_one_rank, name):
        assert f"the gradient of {name} is NaN" in text
        assert unchanged


def alone_in_a_job():
    model = mixed_model()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for group in (None, dist.group.WORLD):
            optimizer = muon(model, process_group=group)
            give_gradients(model, 0)
            optimizer.step()
    return [str(w.message) for w in seen]


def test_ranks_that_each_do_everything_are_told_so():
    for found in harness.run(2, alone_in_a_job):
        assert len(found) == 1
        assert "every rank of this job orthogonalizes all matrices by itself" in found[0]


def test_replicate_momentum_without_replicas_is_said_to_have_no_effect():
    optimizer = muon(mixed_model(), replicate_momentum=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="replicate_momentum has no effect"):
        optimizer.step()
