"""Checkpoints that do not fit the model or its optimizer are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import checkpoint
from tests.support.quiet import quiet


def small(**parts: nn.Module) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), **parts})


def saved(folder: Path, model: nn.Module, **options: Any) -> None:
    with quiet():
        groups = spectral_dist.param_groups(model, **options)
        checkpoint.save(folder, model, spectral_dist.Muon(groups))


def refusal(folder: Path, model: nn.Module, **options: Any) -> str:
    with quiet():
        optimizer = spectral_dist.Muon(spectral_dist.param_groups(model, **options))
        with pytest.raises(ValueError) as error:  # noqa: PT011
            checkpoint.load(folder, model, optimizer)
    return str(error.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no checkpoint" in refusal(tmp_path / "nowhere", small())


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, small())
    message = refusal(tmp_path, small(c=nn.Linear(3, 3)))
    assert "c.weight" in message
    assert "another model" in message


def test_a_parameter_of_another_kind_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "matrix", small())
    assert "no exp_avg_sq of a.weight" in refusal(tmp_path / "matrix", small(), scalars=["a"])
    saved(tmp_path / "scalar", small(), scalars=["a.weight"])
    message = refusal(tmp_path / "scalar", small())
    assert "a.weight is of kind 'matrix' here, but of kind 'scalar' in the checkpoint" in message


def test_groups_with_other_options_are_refused(tmp_path: Path) -> None:
    model = small()
    with quiet():
        groups = spectral_dist.param_groups(model)
        matrices = groups[0]["params"]
        split = [{"params": [p], "lr": lr} for p, lr in zip(matrices, (0.1, 0.2), strict=True)]
        spectral_dist.tag(model)
        optimizer = spectral_dist.Muon([*split, {"params": groups[1]["params"]}])
        checkpoint.save(tmp_path, model, optimizer)
    assert "in two with different options" in refusal(tmp_path, small())
