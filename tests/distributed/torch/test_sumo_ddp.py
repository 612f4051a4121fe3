"""SUMO under DistributedDataParallel with projected gradients: the same numbers, fewer bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients
from spectral_dist.polar import gram_root
from tests.distributed.torch import layouts
from tests.distributed.torch.sumo_runs import OPTIONS, STEPS
from tests.reference import training
from tests.support import harness
from tests.support.quiet import quiet

SUBSPACE = {**OPTIONS, "perp_scale": 0.0}
HEADS = {"qkv": [8, 8, 8]}
"""A pattern that repeats three times: matrices in several blocks of rows."""


def run(
    hook: bool, first: int = 0, last: int = STEPS, load: str = "", save: str = "", **changes: Any
) -> dict[str, Any]:
    """``accumulation`` among the changes: micro-batches of a step."""
    accumulation = changes.pop("accumulation", 1)
    split = changes.pop("split", {"qkv": 3})
    placed = layouts.build("ddp")
    with quiet():
        groups = spectral_dist.param_groups(placed.model, split=split)
        optimizer = spectral_dist.SUMO(groups, **{**SUBSPACE, **changes})
        projection = project_gradients(placed.model, optimizer) if hook else None
        sent = []
        if load:
            spectral_dist.checkpoint.load(load, placed.model, optimizer)
        for step in range(first, last):
            before = projection.meter.bytes.get("all_reduce", 0) if projection else 0
            placed.backward(step, accumulation)
            optimizer.step()
            if projection:
                sent.append(projection.meter.bytes["all_reduce"] - before)
        if save:
            spectral_dist.checkpoint.save(save, placed.model, optimizer)
    trained = {n: p.numel() for n, p in placed.named.items() if p.requires_grad}
    return {"parameters": placed.full(), "sent": sent, "numel": trained}


def run_by_products(hook: bool) -> dict[str, Any]:
    """The hook is right by products, too, where a first step is counted one step later."""
    with mock.patch.object(gram_root, "may_wait", return_value=False):
        return run(hook)


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for a, b in zip(found, wanted, strict=True):
        for name, value in b["parameters"].items():
            error = float((a["parameters"][name] - value).abs().max())
            assert error < (1e-6 if training.is_matrix(name) else 1e-5), (name, error)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}), (4, {"rank": 0.25, "lr": 0.005}), (3, {"accumulation": 2, "basis": "svd"}),
        (2, {"split": HEADS}), (2, {"rank": 1.0}),
    ],
)  # fmt: skip
@pytest.mark.fast_cases("4-changes1", "3-changes2")
def test_equals_projecting_after_the_reduction(world: int, changes: dict[str, Any]) -> None:
    same(
        harness.run(world, run, True, **copy.deepcopy(changes)),
        harness.run(world, run, False, **copy.deepcopy(changes)),
    )


@pytest.mark.slow
def test_by_products_it_equals_projecting_after_the_reduction() -> None:
    found, wanted = (harness.run(2, run_by_products, hook) for hook in (True, False))
    same(found, wanted)
    sent = [result["sent"] for result in found]
    assert all(first == second > third for first, second, third, *_ in sent)


def test_bytes() -> None:
    """Between refreshes r x n of each matrix, in a refresh the whole of it; the rest as ever."""
    found = harness.run(2, run, True, period=1000, last=6)[0]
    whole = 4 * sum(found["numel"].values())
    assert found["sent"][0] == whole
    long_short = [(24, 24)] * 8 + [(56, 24), (61, 24)] * 2 + [(24, 7)] * 3
    inside = sum(round(0.5 * n) * n for _, n in long_short)
    matrices = sum(m * n for m, n in long_short)
    # "unused" has no gradient so far, so it has no basis either
    assert found["sent"][1:] == [whole - 4 * (matrices - inside)] * 5


def test_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    """The owners' bases are loaded, and everyone's copies with them."""
    folder = str(tmp_path / "a")
    harness.run(2, run, True, 0, 9, "", folder)
    same(harness.run(2, run, True, 9, STEPS, folder), harness.run(2, run, False))


def refused() -> list[str]:
    placed = layouts.build("ddp")
    other = DistributedDataParallel(torch.nn.Linear(3, 3))
    texts = []
    with quiet():
        for model, changes in (
            (placed.model, {"perp_scale": 1.0}),
            (placed.model, {"refresh_below": 0.1}),
            (other, {}),
        ):
            groups = spectral_dist.param_groups(placed.model)
            optimizer = spectral_dist.SUMO(groups, **{**SUBSPACE, **changes})
            try:
                project_gradients(model, optimizer)
            except ValueError as error:
                texts.append(str(error))
    dist.barrier()
    return texts


def test_refused() -> None:
    for perp, below, model in harness.run(2, refused):
        assert "perp_scale=0" in perp
        assert "refresh_below=0" in below
        assert "not of this model" in model
