"""How far DeepSpeed moves matrices when gradients are clipped, for ranks."""

from __future__ import annotations

from tests.distributed.deepspeed import engine
from tests.support import models


def moves(stage: int, clip: float, kind: str, world: int) -> dict[str, float]:
    """Distance each matrix moves in two steps under a clip."""
    configuration = engine.config(stage, world, gradient_clipping=clip)
    if kind == "Muon":
        configuration["optimizer"] = {
            "type": "Muon",
            "params": {"lr": 0.02, "momentum": 0.95, "torch_adam": True},
        }
        configuration["zero_optimization"]["reduce_scatter"] = False
    model = models.build(odd=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    if kind == "Muon":
        for name, p in model.named_parameters():
            p.use_muon = p.ndim == 2 and "embed" not in name and "head" not in name  # type: ignore[attr-defined]
    built = engine.engine_for(configuration, model=model)
    engine.steps(built, 0, 2)
    end = engine.full_parameters(built)
    built.destroy()
    return {n: float((end[n] - start[n]).norm()) for n in start if "qkv" in n or "up.weight" in n}
