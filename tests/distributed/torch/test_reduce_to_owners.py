"""Gradients of matrices reduced to their owners under DDP: the same training, fewer bytes."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

import spectral_dist
from benchmarks.traffic import OTHERS, RULES, Traffic
from spectral_dist.integrations.torch.reduce_to_owners import reduce_to_owners
from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients
from tests.distributed.torch.owner_runs import (
    CLIP,
    HEADS,
    STEPS,
    difference,
    even,
    model_of,
    optimizer_of,
    run,
    values,
)
from tests.support import harness
from tests.support.quiet import quiet


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"split": HEADS}),
        (2, {"accumulation": 2, "zeros": True, "ddp": {"gradient_as_bucket_view": True}}),
        (2, {"ddp": {"static_graph": True}}),
        (2, {"ddp": {"dtype": torch.bfloat16}}),
        (2, {"title": "SUMO"}),
        (4, {"split": HEADS, "ddp": {"gradient_as_bucket_view": True}}),
        *(
            pytest.param(world, changes, marks=pytest.mark.slow)
            for world, changes in (
                (2, {}),
                (2, {"accumulation": 3}),
                (2, {"ddp": {"gradient_as_bucket_view": True}}),
                (2, {"ddp": {"dtype": torch.float64}}),
                (2, {"title": "NorMuon"}),
                (2, {"check_finite": False, "zeros": True}),
                (3, {}),
                (4, {}),
            )
        ),
    ],
)
def test_equals_plain_ddp(world: int, changes: dict[str, Any]) -> None:
    """Bitwise on 2 ranks, where a sum of two has one order."""
    found, wanted = (harness.run(world, run, owners, **changes) for owners in (True, False))
    error = difference(found, wanted)
    assert error == 0 if world == 2 else error < 1e-6


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (2, {"accumulation": 2, "ddp": {"gradient_as_bucket_view": True}}),
        (2, {"split": HEADS, "zeros": True}),
        pytest.param(3, {}, marks=pytest.mark.slow),
    ],
)
def test_clips_as_torch_clips_plain_ddp(world: int, changes: dict[str, Any]) -> None:
    found, wanted = (
        harness.run(world, run, owners, clip=CLIP, **changes) for owners in (True, False)
    )
    assert difference(found, wanted) < 1e-6
    for ours in found:
        assert ours["norms"] == found[0]["norms"]
        assert min(ours["norms"]) > CLIP
        for norm, expected in zip(ours["norms"], wanted[0]["norms"], strict=True):
            assert math.isclose(norm, expected, rel_tol=1e-6)
    free = harness.run(world, run, True, **changes)
    assert difference(free, wanted) > 1e-4


class Sometimes(nn.Module):
    """Each rank of a group uses one of two weights, and the group's first a third, a stack."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rank = rank
        self.first, self.second = (nn.Linear(6, 6, bias=False) for _ in range(2))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(x) if self.rank else self.first(x)
        return self.head(y if self.rank else y @ self.stack.sum(0)).square().mean()


def in_groups(owners: bool) -> dict[str, Any]:
    """Two groups of two ranks, which are not neighbours, each with a model of its own."""
    groups = [dist.new_group([first, first + 2]) for first in (0, 1)]
    group = groups[dist.get_rank() % 2]
    rank = dist.get_rank(group)
    model = DistributedDataParallel(
        Sometimes(rank), process_group=group, find_unused_parameters=True
    )
    with quiet():
        optimizer = optimizer_of(model, split={})
        reduction = reduce_to_owners(model, optimizer) if owners else None
        for step in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            model(torch.randn(5, 6, generator=generator)).backward()
            optimizer.step()
    owned = {run.owner for run in reduction.parts} if reduction else {0, 1}
    assert owned == {0, 1}
    return {"parameters": values(model)}


def test_ranks_that_do_not_use_a_matrix() -> None:
    found, wanted = (harness.run(4, in_groups, owners) for owners in (True, False))
    for first in (0, 1):
        assert difference(found[first::2], wanted[first::2]) == 0
    assert difference(found[:1], wanted[1:2]) > 1e-3


# -- what it sends


def sent(title: str) -> dict[str, Any]:
    """Bytes of the second step, when DDP has rebuilt its buckets."""
    model = DistributedDataParallel(even())
    optimizer = optimizer_of(model, title, split={}, check_finite=False)
    reduction = reduce_to_owners(model, optimizer)
    for step in range(2):
        before = dict(reduction.meter.bytes), dict(optimizer.meter.bytes)
        optimizer.zero_grad()
        model(torch.tensor([step, 1, 2])).square().sum().backward()
        optimizer.step()
    after = reduction.meter.bytes, optimizer.meter.bytes
    counted = [
        {k: v - old.get(k, 0) for k, v in new.items()}
        for old, new in zip(before, after, strict=True)
    ]
    return {"hook": counted[0], "optimizer": counted[1], "runs": len(reduction.parts)}


@pytest.mark.parametrize("title", ["Muon", "SUMO"])
@pytest.mark.parametrize("world", [2, 4])
def test_sends_what_the_all_reduce_of_plain_ddp_sends(world: int, title: str) -> None:
    """To the byte, where owners have equal shares; beside it one number a matrix, for norms."""
    share, matrices, rest = (world - 1) / world, 8 * 64, 32 + 32
    for ours in harness.run(world, sent, title):
        assert ours["hook"]["reduce"] == share * 4 * matrices
        assert ours["optimizer"] == {"all_gather": share * 4 * matrices}
        norms = 2 * share * 8 * (ours["runs"] + 1)
        assert ours["hook"]["all_reduce"] == 2 * share * 4 * rest + norms
        whole = sum(ours["hook"].values()) + sum(ours["optimizer"].values())
        assert whole - norms == 2 * share * 4 * (matrices + rest)


def calls() -> dict[str, int]:
    """Bytes of a backward pass's collectives, counted at torch's functions."""
    model = DistributedDataParallel(even())
    optimizer = optimizer_of(model, split={}, check_finite=False)
    reduce_to_owners(model, optimizer)
    model(torch.tensor([0, 1, 2])).square().sum().backward()
    optimizer.step()
    with contextlib.ExitStack() as restored:
        for name in (*RULES, *OTHERS.split()):
            for module in (dist, dist.distributed_c10d):
                restored.callback(setattr, module, name, getattr(module, name))
        traffic = Traffic()
        traffic.on = True
        optimizer.zero_grad()
        model(torch.tensor([1, 1, 2])).square().sum().backward()
        traffic.on = False
    return dict(traffic.bytes)


def test_its_meter_counts_what_torch_is_asked_to_send() -> None:
    """By the convention of the benchmarks a reduction is (P - 1) / P of its bytes on each rank."""
    for ours in harness.run(2, calls):
        assert ours["reduce"] == 4 * 8 * 64 / 2
        assert ours["all_reduce"] == 4 * (32 + 32) + 8 * (8 + 1)


# -- the rest of a training


def test_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    harness.run(2, run, True, 0, 2, save=folder)
    found = harness.run(2, run, True, 2, STEPS, load=folder)
    assert difference(found, harness.run(2, run, False)) == 0
    # in a run without it
    assert difference(harness.run(2, run, False, 2, STEPS, load=folder), found) == 0


def test_the_monitor_says_the_same(tmp_path: Path) -> None:
    reports = []
    for owners in (True, False):
        path = tmp_path / f"{owners}.jsonl"
        harness.run(2, run, owners, monitor=str(path))
        reports.append(path.read_text())
    assert reports[0] == reports[1]
    assert len(reports[0].splitlines()) == STEPS // 2


# -- what is refused


def not_possible() -> list[str]:
    model, texts = model_of(), []
    other = DistributedDataParallel(nn.Linear(3, 3))
    hooked = model_of()
    with quiet():
        optimizer = optimizer_of(model)
        project_gradients(hooked, optimizer_of(hooked, "SUMO", perp_scale=0.0))
        poet = DistributedDataParallel(spectral_dist.poet.convert(even(), block=4))
        half = DistributedDataParallel(even().to(torch.float16))
        last = DistributedDataParallel(
            nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
        )
        pairs = [
            (model, optimizer_of(model, replicate_momentum=True)),
            (other, optimizer),
            (model.module, optimizer),
            (hooked, optimizer_of(hooked, "SUMO", perp_scale=0.0)),
            (poet, spectral_dist.POET(spectral_dist.param_groups(poet), lr=0.01)),
            (model, torch.optim.AdamW(model.parameters())),
            (half, optimizer_of(half, split={})),
            (last, optimizer_of(last, split={})),
        ]
        for wrapped, wrong in pairs:
            try:
                reduce_to_owners(wrapped, wrong)
            except ValueError as error:
                texts.append(str(error))
        reduce_to_owners(model, optimizer)
        try:
            project_gradients(model, optimizer_of(model, "SUMO", perp_scale=0.0))
        except ValueError as error:
            texts.append(str(error))
    dist.barrier()
    return texts


def test_refused() -> None:
    for texts in harness.run(2, not_possible):
        words = [
            "replicate_momentum=False", "is not of this model", "is a Tiny", "hook already",
            "this POET has none", "this AdamW has none", "is float16", "is channels_last",
            "project_gradients: the model has a communication hook already",
        ]  # fmt: skip
        assert len(texts) == len(words), texts
        for text, word in zip(texts, words, strict=True):
            assert word in text


def by_itself() -> None:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = DistributedDataParallel(even(), process_group=group)
    with quiet():
        optimizer = optimizer_of(model, split={})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reduction = reduce_to_owners(model, optimizer)
    assert any("reduce_to_owners has no effect" in str(w.message) for w in caught)
    model(torch.tensor([0, 1, 2])).mul(1e6).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    norm = get_total_norm(grads)
    assert torch.allclose(reduction.clip_grad_norm_(float(norm) / 2), norm)
    assert torch.allclose(get_total_norm([p.grad for p in model.parameters()]), norm / 2, rtol=1e-4)
    clip_grad_norm_(model.parameters(), 1e-9)  # as in one process
    optimizer.step()


def test_a_rank_by_itself() -> None:
    harness.run(2, by_itself)
