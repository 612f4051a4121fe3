"""``heads`` in DeepSpeed's JSON: two ranks take the steps of torch's Muon in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_dist
from tests.distributed.deepspeed import engine
from tests.support import harness


class Attention(nn.Module):
    """Four heads of q, two of k and v, of 4 rows each."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(16, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)) for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (y.repeat_interleave(2, -2) for y in (k, v))
        y: Tensor = self.o_proj((q * k.tanh() * v).flatten(-2))
        return y.square().mean()


def build() -> nn.Module:
    torch.manual_seed(2)
    return Attention()


def batches() -> Tensor:
    return torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(4))


def train(stage: int) -> tuple[int, dict[str, Tensor]]:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    configuration = engine.config(stage, world, options={"heads": "auto"})
    running = engine.engine_for(configuration, model=build())
    for batch in batches():
        running.backward(running(batch.chunk(world)[rank]))
        running.step()
    result = running.basic_optimizer.polar_calls, engine.full_parameters(running)
    running.destroy()
    return result


def alone() -> dict[str, Tensor]:
    model: Any = build()
    groups = spectral_dist.param_groups(model, heads="auto")
    optimizer = spectral_dist.Muon(groups, **engine.OPTIONS)
    for batch in batches():
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [2, 3])
def test_as_one_process(stage: int) -> None:
    expected = alone()
    found = harness.run(2, train, stage)
    assert sum(calls for calls, _ in found) == 3 * (4 + 2 + 2 + 1)
    for _, weights in found:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)
