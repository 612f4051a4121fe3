"""torch.autocast around step(), a merge or an export changes no bit."""

from __future__ import annotations

import pytest
import torch

import spectral_dist
from spectral_dist.monitor import Monitor
from spectral_dist.rules import registry
from tests.support.weights import give_gradients, same, values
from tests.unit.core.trained import build

TITLES = [entry.title for entry in registry.entries()]


def run(title: str, autocast: bool) -> tuple[dict, list, dict]:
    model, optimizer = build(title)
    optimizer.monitor = Monitor(every=2, write=[lambda step, report: None])
    for step in range(5):
        give_gradients(model, step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            optimizer.step()
            assert torch.is_autocast_enabled("cpu") == autocast
    states = [dict(state) for state in optimizer.state.values()]
    exported = {}
    if title == "POET":
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            exported = spectral_dist.poet.export(model)
    return values(model), states, exported


@pytest.mark.parametrize("title", TITLES)
def test_no_bit_changes(title: str) -> None:
    (weights, states, exported), wanted = (run(title, autocast) for autocast in (True, False))
    assert same(weights, wanted[0])
    assert all(same(a, b) for a, b in zip(states, wanted[1], strict=True))
    assert same(exported, wanted[2])
    assert all(v.dtype == torch.float32 for state in states for v in state.values())


def test_a_closure_keeps_it() -> None:
    """It computes the loss, for which autocast is there."""
    model, optimizer = build("Muon")
    seen = []

    def closure() -> torch.Tensor:
        give_gradients(model, 0)
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.append(product.dtype)
        return product.sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
    assert seen == [torch.bfloat16]
