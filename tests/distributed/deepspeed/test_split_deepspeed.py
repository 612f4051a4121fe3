"""Strategy ``split`` under DeepSpeed: four ranks, two matrices, the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_dist
from tests.distributed.deepspeed import engine
from tests.support import harness


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh()).square().mean()
        return y


def build() -> nn.Module:
    torch.manual_seed(2)
    return Two()


def batches() -> Tensor:
    return torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(4))


def train(stage: int) -> tuple[int, set[str], dict[str, Tensor]]:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    configuration = engine.config(stage, world, options={"strategy": "split"})
    running = engine.engine_for(configuration, model=build())
    for batch in batches():
        running.backward(running(batch.chunk(world)[rank]))
        running.step()
    optimizer: Any = running.basic_optimizer
    plans = [unit.plan for unit in optimizer.all_units if hasattr(unit, "plan")]
    strategies = {strategy for plan in plans for strategy in plan.strategies}
    result = optimizer.polar_calls, strategies, engine.full_parameters(running)
    running.destroy()
    return result


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.fast_cases("3")
def test_as_one_process(stage: int) -> None:
    model: Any = build()
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), **engine.OPTIONS)
    for batch in batches():
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = harness.run(4, train, stage)
    assert sum(calls for calls, _, _ in found) == 3 * 2
    for _, strategies, weights in found:
        assert strategies == {"split"}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                weights[name], parameter.detach(), rtol=0, atol=1e-6, msg=name
            )
