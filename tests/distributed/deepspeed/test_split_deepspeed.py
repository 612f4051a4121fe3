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


def with_machine(stage: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any, set[str]]:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    running = engine.engine_for(engine.config(stage, world, options=options), model=build())
    for batch in batches():
        running.backward(running(batch.chunk(world)[rank]))
        running.step()
    optimizer: Any = running.basic_optimizer
    plans = [unit.plan for unit in optimizer.all_units if hasattr(unit, "plan")]
    strategies = {strategy for plan in plans for strategy in plan.strategies}
    result = engine.full_parameters(running), dict(optimizer.meter.calls), strategies
    running.destroy()
    return result


def test_zero3_in_two_steps_is_bitwise_the_same() -> None:
    """Two hosts of two ranks, where messages take so long that they go within hosts first."""
    machine = {"ranks_per_host": 2, "message": 1.0}
    at_once = harness.run(4, with_machine, 3, {"strategy": "owner"})
    in_two = harness.run(4, with_machine, 3, {"strategy": "owner", "machine": machine})
    for (wanted, once, _), (weights, twice, _) in zip(at_once, in_two, strict=True):
        assert all(torch.equal(weights[name], value) for name, value in wanted.items())
        assert twice["all_to_all"] == 2 * once["all_to_all"] > 0


def test_auto_takes_teams_where_a_machine_says_that_they_are_faster() -> None:
    machine = {"flops": 1e3, "flops_wide": 1e3}
    for _, _, strategies in harness.run(4, with_machine, 3, {"machine": machine}):
        assert strategies == {"split"}
