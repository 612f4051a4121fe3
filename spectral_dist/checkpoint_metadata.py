"""Whether a checkpoint is of this model, by what its metadata says is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def check_entries(
    folder: str | Path,
    model: Mapping[str, Any],
    state: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, Any],
) -> None:
    """Raise a ValueError if a checkpoint is of other parameters, or lacks a parameter's state."""
    for name, entry in state.items():
        for key in entry:
            if f"optimizer.state.{name}.{key}" not in saved:
                raise ValueError(
                    f"{folder} has no {key} of {name}; it was saved of another model, or with that"
                    " parameter on the other of the rule and AdamW (matrices, scalars)"
                )
    for name, tensor in model.items():
        there = getattr(saved.get(f"model.{name}"), "size", None)
        if there is not None and isinstance(tensor, Tensor) and there != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} here, but {tuple(there)} in {folder}: it was"
                " saved of another model"
            )
    prefix = "optimizer.state."
    for name in (k[len(prefix) :].rpartition(".")[0] for k in saved if k.startswith(prefix)):
        if name not in state and name not in model:
            raise ValueError(f"{folder} has {name}, which is not here: it is of another model")
