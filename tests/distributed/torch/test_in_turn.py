"""Replicas that send directions one after the other, as many large ones do: the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import spectral_dist
from spectral_dist.sharding import plan
from tests.distributed.torch import layouts
from tests.support import harness
from tests.support.quiet import quiet


def run(layout: str, title: str, at_once: int) -> dict[str, Tensor]:
    """Train, save torch's own state dict, load it into another optimizer and go on."""
    original, plan.AT_ONCE = plan.AT_ONCE, at_once
    try:
        placed = layouts.build(layout)
        state: Any = None
        for first, last in ((0, 2), (2, 4)):
            with quiet():
                groups = spectral_dist.param_groups(placed.model, split={"qkv": 3})
                optimizer = getattr(spectral_dist, title)(groups, lr=0.02)
                if state is not None:
                    optimizer.load_state_dict(state)
                for step in range(first, last):
                    placed.backward(step)
                    optimizer.step()
            buckets = [b for u in optimizer.all_units if hasattr(u, "plan") for b in u.plan.buckets]
            assert {bucket.in_turn for bucket in buckets} == {not at_once}
            if layout == "ddp":
                optimizer.consolidate_state_dict()
            state = copy.deepcopy(optimizer.state_dict())
        assert dist.get_world_size() > 1
        return placed.full()
    finally:
        plan.AT_ONCE = original


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 3), ("hsdp", 4)])
@pytest.mark.parametrize("title", ["Muon", "NorMuon"])
@pytest.mark.fast_cases("NorMuon-ddp-3", "Muon-hsdp-4")
def test_the_same_bits(layout: str, ranks: int, title: str) -> None:
    wanted = harness.run(ranks, run, layout, title, plan.AT_ONCE)[0]
    for weights in harness.run(ranks, run, layout, title, 0):
        for name, value in wanted.items():
            assert torch.equal(weights[name], value), name
