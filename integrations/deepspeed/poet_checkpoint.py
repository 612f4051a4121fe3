"""POET's part in DeepSpeed's checkpoints: they are marked as POET's, and universal ones completed.

DeepSpeed saves frozen weights and ``_extra_state``, and loads them again, but not from a universal
checkpoint. At stage 3 such a load also gives every group the step count of the first one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_dist.checkpoint.files import failing_together
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.deepspeed.checkpoint_io import wrap_checkpoints
from spectral_dist.integrations.deepspeed.files import read_model_files
from spectral_dist.poet.optimizer import POET

KEY = "spectral_poet"
"""The key in client_state of {"steps": {a group's id: its step count}}."""


def checkpoint_poet(engine: Any, optimizer: POET) -> None:
    """Make this engine mark its checkpoints as POET's, and load all of universal ones."""

    def before_save(folder: Path, argument: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        if argument("exclude_frozen_parameters"):
            raise ValueError(
                "exclude_frozen_parameters leaves out W, in which POET keeps what it has learned;"
                " save without it"
            )
        steps = {g["id"]: float(s["step"]) for g, s in _states(optimizer) if "step" in s}
        return {KEY: {"steps": steps}}

    def after_load(path: str, client_state: dict[str, Any], loads_states: bool) -> None:
        entry = client_state.pop(KEY, None)
        if entry is None:
            raise ValueError(
                f"{path} was not saved with POET: it has no rotations, and W is not what it would"
                " be with them. Load it with the optimizer it was saved with"
            )
        if not engine.load_universal_checkpoint():
            return
        if loads_states:
            optimizer.prepare_placement()  # stage 3 gave all groups the first one's options
            for group, state in _states(optimizer):
                if "step" in state:
                    state["step"] = torch.tensor(entry["steps"][group["id"]])
        _load_layers(Path(path if os.path.isdir(path) else os.path.dirname(path)), optimizer)

    wrap_checkpoints(engine, after_load, before_save)


def refuse_poet(engine: Any) -> None:
    """Make an engine with another optimizer refuse to load POET's checkpoints."""

    def after_load(path: str, client_state: dict[str, Any], loads_states: bool) -> None:
        if KEY in client_state:
            raise ValueError(
                f"{path} was saved with POET, whose weights are W and rotations apart; load it with"
                " SpectralPOET, and take plain weights out of it with spectral_dist.poet.export"
            )

    wrap_checkpoints(engine, after_load)


def _states(optimizer: ShardedOptimizer) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (parameter group, state) of every tensor that DeepSpeed steps."""
    for group, tensors in optimizer.placement.param_batches(optimizer):
        for p in tensors:
            yield group, optimizer.state.get(p, {})


def _load_layers(folder: Path, optimizer: POET) -> None:
    """Load every layer's W and ``_extra_state`` from the model files of a universal checkpoint.

    If the run was at stages 0 to 2, one file has all of W; at stage 3 each rank's file has a run of
    its elements.

    Args:
        folder: the checkpoint's folder.
        optimizer: its layers are written.

    Raises:
        ValueError: on every rank, if a file cannot be read; or if a layer is not in it.
    """
    with failing_together():
        saved = read_model_files(folder)
    module = saved[0]["module"]
    for layer in optimizer.layers:
        layer.set_extra_state(_entry(module, f"{layer.key}._extra_state", folder))
        name = f"{layer.key}.weight"
        with optimizer.placement.gathered([layer.weight], write=True) as (weight,):
            values = _entry(module, name, folder)
            if values.numel() != weight.numel():
                fragments = [file[_compat.FROZEN_PARAM_FRAGMENTS] or {} for file in saved]
                runs = [_entry(tensors, name, folder).flatten() for tensors in fragments]
                values = torch.cat(runs)[: weight.numel()]
            weight.copy_(values.view_as(weight))


def _entry(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    """Return the tensor of this name; ValueError if the checkpoint in ``folder`` has none."""
    if name not in tensors:
        raise ValueError(
            f"the checkpoint {folder} has no {name}: it is of another model, or of its parts"
        )
    return tensors[name]
