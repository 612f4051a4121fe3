"""ZeRO-3 applies gradients again of layers that were not used since: a warning names them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.deepspeed import engine
from tests.distributed.torch import layouts
from tests.support import harness

SKIPPED = ("layers.1.qkv.weight", "layers.1.down.weight", "layers.1.norm.weight")


class Skipping(nn.Module):
    """A model that leaves out its second layer when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layouts.conditioned(odd=False)
        self.skips = False

    def forward(self, tokens: Tensor) -> Tensor:
        layers = self.inner.layers
        x = layers[0](self.inner.embed(tokens))
        x = x if self.skips else layers[1](x)
        logits = self.inner.head(x)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def train(stage: int, skipped: list[bool], accumulation: int, kind: str) -> dict[str, Any]:
    """The warnings of each step, and the parameters; ``skipped``: by micro-batch."""
    configuration = engine.config(stage, 2, accumulation=accumulation)
    if kind == "AdamW":
        configuration["optimizer"] = {"type": kind, "params": {"lr": 0.01, "torch_adam": True}}
    running = engine.engine_for(configuration, model=Skipping())
    told = []
    for number, skips in enumerate(skipped):
        running.module.skips = skips
        step, part = divmod(number, accumulation)
        data = layouts.tokens(step).chunk(2)[dist.get_rank()].chunk(accumulation)[part]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            running.backward(running(data))
            running.step()
        texts = [str(w.message) for w in caught]
        told.append([text for text in texts if "that of an earlier step again" in text])
    parameters = engine.full_parameters(running)
    running.destroy()
    return {"told": told, "parameters": parameters}


CASES: dict[str, tuple[int, list[bool], int, list[int]]] = {
    "used in every step": (3, [False, False, False], 1, [0, 0, 0]),
    "never used": (3, [True, True], 1, [0, 0]),
    "left out of a step": (3, [False, True, True], 1, [0, 7, 0]),
    "left out of a first micro-batch": (3, [False, False, True, False], 2, [0, 0, 0, 7]),
    "left out of a second micro-batch": (3, [False, False, False, True], 2, [0, 0, 0, 0]),
    "at stage 2": (2, [False, True], 1, [0, 0]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.fast_cases("left out of a step", "left out of a second micro-batch")
def test_a_gradient_that_is_applied_again_is_told(case: str) -> None:
    stage, skipped, accumulation, wanted = CASES[case]
    for result in harness.run(2, train, stage, skipped, accumulation, "SpectralMuon"):
        assert [len(texts) for texts in result["told"]] == wanted
        told = [text for texts in result["told"] for text in texts]
        assert not told or all(any(name in text for text in told) for name in SKIPPED)


@pytest.mark.slow
def test_deepspeed_itself_applies_it_again() -> None:
    """Where this fails, DeepSpeed clears its buffers, and our warning can go."""
    moved = {}
    for stage in (2, 3):
        (first, _), (second, _) = (
            harness.run(2, train, stage, [False, *[True] * more], 1, "AdamW") for more in (1, 2)
        )
        name = "inner.layers.1.up.weight"
        moved[stage] = torch.dist(second["parameters"][name], first["parameters"][name]).item()
    assert moved[3] > 1.2 * moved[2], moved
