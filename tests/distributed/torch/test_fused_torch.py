"""Fused weights, and heads of their own, under FSDP2: as one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import spectral_dist
from tests.support import harness
from tests.unit.params.tiny_transformers import build

pytest.importorskip("transformers")


def two_steps(model: nn.Module, heads: str | None) -> tuple[list[int], dict[str, Tensor]]:
    """Train a model with random gradients; return how many matrices each has, and its weights."""
    groups = spectral_dist.param_groups(model, heads=heads)
    optimizer = spectral_dist.Muon(groups, lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizer.step()
    counts = [len(spec.matrices) for group in groups for spec in group["routes"]]
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return counts, weights


def sharded(name: str, heads: str | None) -> tuple[list[int], dict[str, Tensor]]:
    """On each rank: the model under FSDP2, whose rows do not fall on heads or parts."""
    model: Any = build(name)
    layers = model.gpt_neox.layers if name.startswith("GPTNeoX") else model.model.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return two_steps(model, heads)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("GPTNeoXForCausalLM", None),
        ("GPTNeoXForCausalLM", "auto"),
        ("DeepseekV3ForCausalLM", "auto"),
    ],
)
def test_as_one_process(name: str, heads: str | None) -> None:
    counts, expected = two_steps(build(name), heads)
    assert max(counts) == {None: 3, "auto": 12 if name.startswith("GPTNeoX") else 8}[heads]
    for found, weights in harness.run(2, sharded, name, heads):
        assert found == counts
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=2e-5, msg=key)
