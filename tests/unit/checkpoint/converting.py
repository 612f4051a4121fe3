"""Small runs whose checkpoints are converted: saved, loaded, changed and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import checkpoint
from spectral_dist.checkpoint import convert
from tests.distributed.deepspeed import engine
from tests.reference import training
from tests.support import models
from tests.support.quiet import quiet


def muon(model: nn.Module, **options: Any) -> Any:
    with quiet():
        groups = spectral_dist.param_groups(model)
        return spectral_dist.Muon(groups, **{**engine.OPTIONS, **options})


def steps(model: nn.Module, optimizers: Any, first: int, last: int) -> list[float]:
    """Losses of steps on the global batches."""
    losses = []
    with quiet():
        for step in range(first, last):
            model.zero_grad()
            losses.append(model(models.tokens(step)))
            losses[-1].backward()
            for optimizer in optimizers:
                optimizer.step()
    return [float(loss.detach()) for loss in losses]


def saved(folder: Path, count: int = 3, odd: bool = True, **extra: Any) -> tuple[nn.Module, Any]:
    model = models.build(odd=odd)
    optimizer = muon(model)
    steps(model, [optimizer], 0, count)
    with quiet():
        checkpoint.save(folder, model, optimizer, **extra)
    return model, optimizer


def loaded(folder: Path, odd: bool = True, **options: Any) -> tuple[nn.Module, Any]:
    model = models.build(seed=1, odd=odd)
    optimizer = muon(model, **{"lr": 0.5, **options})
    with quiet():
        checkpoint.load(folder, model, optimizer)
    return model, optimizer


def kinds(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    named = list(model.named_parameters())
    return [[(n, p) for n, p in named if training.is_matrix(n) == kind] for kind in (True, False)]


def torchs(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """torch's pair, with the options of ours."""
    matrix, scalar = kinds(model)
    return {
        "muon": torch.optim.Muon(matrix, adjust_lr_fn="match_rms_adamw", lr=0.02, weight_decay=0.1),
        "adamw": torch.optim.AdamW(scalar, lr=0.005, weight_decay=0.01, betas=(0.9, 0.95)),
    }


def torch_file(path: Path, count: int = 3) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
    model = models.build(odd=False)
    optimizers = torchs(model)
    steps(model, optimizers.values(), 0, count)
    parts = {part: optimizer.state_dict() for part, optimizer in optimizers.items()}
    torch.save({"model": model.state_dict(), **parts}, path)
    return model, optimizers


def refused(message: str, *args: Any) -> None:
    with pytest.raises(ValueError, match=message):
        convert.convert(*args)


def changed(path: Path, change: Any) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path.with_suffix(".changed"))
    return path.with_suffix(".changed")
