"""Small models with their optimizers, and loads that are refused and change nothing."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_dist
from spectral_dist import checkpoint
from spectral_dist.checkpoint import files as checkpoint_files

RULES = {"Muon": {}, "SUMO": {"rank": 2}}


def made(
    kind: str = "Muon", steps: int = 0, seed: int = 0, **options: Any
) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {**RULES.get(kind, {}), **options}
        optimizer = getattr(spectral_dist, kind)(spectral_dist.param_groups(model), **given)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randint(7, (5,), generator=torch.manual_seed(step))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def everything(model: nn.Module, optimizer: Any) -> tuple[list[tuple[str, Tensor]], Any]:
    """All that a load may change: weights, states, matrix state; and the groups."""
    tensors = [(name, value) for name, value in model.state_dict().items()]
    for index, p in enumerate(model.parameters()):
        tensors += [(f"{index}.{key}", value) for key, value in optimizer.state[p].items()]
    tensors += [(f"{m}.{k}", v) for m, s in optimizer.matrix_state().items() for k, v in s.items()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [(name, value.detach().clone()) for name, value in tensors], groups


def unchanged(before: Any, model: nn.Module, optimizer: Any) -> None:
    after = everything(model, optimizer)
    assert after[1] == before[1]
    assert [name for name, _ in after[0]] == [name for name, _ in before[0]]
    for (name, value), (_, old) in zip(after[0], before[0], strict=True):
        assert torch.equal(value, old), name


def refused(folder: Path, model: nn.Module, optimizer: Any) -> str:
    """What a load says, which must have changed nothing."""
    before = everything(model, optimizer)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        checkpoint.load(folder, model, optimizer)
    unchanged(before, model, optimizer)
    return str(error.value)


def without_manifest(folder: Path) -> None:
    """Make it one of an older release."""
    (folder / checkpoint_files.MANIFEST).unlink()
    metadata = checkpoint_files.read_metadata(folder)
    del metadata.manifest  # type: ignore[attr-defined]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
