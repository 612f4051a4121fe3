"""spectral_poet under Megatron: one process's numbers, and its merges under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import harness
from tests.integrations import megatron_cpu
from tests.integrations import megatron_model as models
from tests.integrations.megatron_runs import DISTRIBUTED

NEW, OLD = "0.19.2", "0.16.1"
EVERY, STEPS = 3, 8  # two merges, and steps after them
SETTINGS = {"block": 8, "segments": 4}
MODEL = {"query_groups": 4}  # for TP 4


def build(
    version: str,
    groups: dict[str, Any] | None = None,
    wrapping: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[int, int], Any, Any]:
    """(data rank, ranks), the wrapped converted model, Megatron's optimizer."""
    megatron_cpu.install(version)
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer, poet

    data = models.parallel(**(groups or {}))
    gpt = poet.convert(models.gpt(**{**MODEL, **(model or {})}), **{**SETTINGS, **(settings or {})})
    ddp = models.wrap(gpt, **(wrapping or {}))
    given = {"adam_eps": 1e-4, "adam_beta2": 0.999, **(config or {})}
    settings_ = models.optimizer_config(ddp, optimizer="spectral_poet", **given)
    chosen = {"merge_every": EVERY, **(options or {})}
    return data, ddp, get_spectral_megatron_optimizer(settings_, [ddp], **chosen)


def layers(ddp: Any) -> dict[str, Any]:
    return {m.key: m for m in models.gpt_of(ddp).modules() if hasattr(m, "rotations")}


def inner(optimizer: Any) -> Any:
    return optimizer.chained_optimizers[0].optimizer


def whole(ddp: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter (or gradient) of the whole model: fused ones with their ranks' rows."""
    if not gradients:
        return models.full_parameters(ddp)
    found = {
        name: models.gathered(p.main_grad, p)
        for name, p in models.named_parameters(ddp)
        if p.requires_grad
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    merged: dict[str, Tensor] = {}
    for theirs in everyone:
        for name, value in theirs.items():
            first = merged.setdefault(name, value)
            assert torch.equal(first, value), f"ranks differ in the gradient of {name}"
    return merged


def train(*args: Any, steps: int = STEPS, **kwargs: Any) -> dict[str, Any]:
    """Losses, norms, the parameters after the steps, and the last gradients."""
    data, ddp, optimizer = build(*args, **kwargs)
    grads: dict[str, Tensor] = {}
    step = optimizer.step

    def look() -> Any:
        grads.update(whole(ddp, gradients=True))
        return step()

    optimizer.step = look
    before = whole(ddp)
    found = [models.train_step(ddp, optimizer, models.batch(s, *data)) for s in range(steps)]
    return {
        "losses": [loss for loss, _ in found],
        "norms": [norm for _, norm in found],
        "before": before,
        "parameters": whole(ddp),
        "gradients": grads,
        "merges": {layer.merges for layer in layers(ddp).values()},
        "since": inner(optimizer).since,
        "bytes": inner(optimizer).comm_bytes,
    }


if __name__ == "__main__":
    import sys

    tp = int(sys.argv[1])
