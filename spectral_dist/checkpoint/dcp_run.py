"""Folders of spectral_dist.checkpoint.save, read and written without a model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from spectral_dist.checkpoint import files
from spectral_dist.checkpoint.run import Run, no_place


def read_dcp(folder: Path) -> Run:
    """Return the run in a folder of ``spectral_dist.checkpoint.save``.

    Raises:
        ValueError: it is damaged, holds matrix state, or keys that ``save`` does not write.
    """
    files.verify(folder, single_process=True)
    metadata = files.read_metadata(folder)
    content: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else b""
        for key, entry in metadata.state_dict_metadata.items()
    }
    files.read(folder, content, flat=False)
    run = Run()
    for key, path in (metadata.planner_data or {}).items():
        match path:
            case ("model", name) if isinstance(content[key], Tensor):
                run.model[name] = content[key]
            case ("optimizer", "state", name, what):
                run.state.setdefault(name, {})[what] = content[key]
            case ("optimizer", "groups"):
                run.groups = json.loads(content[key])
                rules = [group.pop("rule", None) for group in run.groups]
                run.rule = rules[0] if rules else None
            case ("optimizer", "matrices", *_):
                raise ValueError(no_place(folder))
            case ("extra",):
                run.extra = torch.load(io.BytesIO(content[key]), weights_only=True)
            case _:
                raise ValueError(f"{folder}: {key} is nothing that spectral_dist saves")
    return run


def write_dcp(folder: Path, run: Run) -> None:
    """Write a run as a folder that ``spectral_dist.checkpoint.load`` takes."""
    file = io.BytesIO()
    torch.save(run.extra, file)
    groups = [{**group, "rule": run.rule} for group in run.groups]
    content = {
        "model": run.model,
        "optimizer": {"state": run.state, "groups": json.dumps(groups)},
        "extra": file.getvalue(),
    }
    files.write(folder, content, single_process=True)
