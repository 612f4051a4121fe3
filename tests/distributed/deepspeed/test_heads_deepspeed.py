"""Parts of weights in DeepSpeed's JSON: two ranks take the steps of torch's Muon in one process."""

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


class SideBySide(nn.Module):
    """Weights stored in x out, whose rows ZeRO cuts anywhere: 12 and 14 columns of 16 rows."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.halves, self.seconds = conv1d(12, 16), conv1d(14, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.halves(x).square().mean() + self.seconds(x).tanh().square().mean()
        return y


HEADS = {"heads": "auto"}
COLUMNS = {"split": {r"halves\.weight": [5, 7], r"seconds\.weight": [1, 1]}}


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return kind()


def batches() -> Tensor:
    return torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(4))


def train(stage: int, kind: type[nn.Module], options: Any) -> tuple[int, dict[str, Tensor]]:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    configuration = engine.config(stage, world, options=options)
    running = engine.engine_for(configuration, model=build(kind))
    for batch in batches():
        running.backward(running(batch.chunk(world)[rank]))
        running.step()
    result = running.basic_optimizer.polar_calls, engine.full_parameters(running)
    running.destroy()
    return result


def alone(kind: type[nn.Module], options: Any) -> dict[str, Tensor]:
    model: Any = build(kind)
    groups = spectral_dist.param_groups(model, **options)
    optimizer = spectral_dist.Muon(groups, **engine.OPTIONS)
    for batch in batches():
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("kind", "options", "matrices"),
    [(Attention, HEADS, 4 + 2 + 2 + 1), (SideBySide, COLUMNS, 4)],
    ids=["heads", "columns"],
)
def test_as_one_process(stage: int, kind: type[nn.Module], options: Any, matrices: int) -> None:
    expected = alone(kind, options)
    found = harness.run(2, train, stage, kind, options)
    assert sum(calls for calls, _ in found) == 3 * matrices
    for _, weights in found:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)
