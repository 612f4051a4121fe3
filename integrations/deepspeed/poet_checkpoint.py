"""What DeepSpeed's checkpoints need for POET: they are known as its own, and universal ones whole.

DeepSpeed saves frozen weights and ``_extra_state``, and loads them again, but not when it loads a
universal checkpoint; and at stage 3 it then gives every group the step count of the first.
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
from spectral_dist.integrations.deepspeed.checkpoint_io import around_checkpoints
from spectral_dist.integrations.deepspeed.files import read_model_files
from spectral_dist.poet.optimizer import POET

KEY = "spectral_poet"
"""In client_state: {"steps": {a group's id: its step count}}."""


def keep_poet(engine: Any, optimizer: POET) -> None:
    """Have this engine's checkpoints say that they are POET's, and load universal ones whole."""

    def before_save(folder: Path, argument: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        if argument("exclude_frozen_parameters"):
            raise ValueError(
                "exclude_frozen_parameters leaves out W, in which POET keeps what it has learned;"
                " save without it"
            )
        steps = {g["id"]: float(s["step"]) for g, s in _states(optimizer) if "step" in s}
        return {KEY: {"steps": steps}}

    def after_load(path: str, client_state: dict[str, Any], wanted: bool) -> None:
        mine = client_state.pop(KEY, None)
        if mine is None:
            raise ValueError(
                f"{path} was not saved with POET: it has no rotations, and W is not what it would"
                " be with them. Load it with the optimizer it was saved with"
            )
        if not engine.load_universal_checkpoint():
            return
        if wanted:
            optimizer.prepare_placement()  # stage 3 gives all the first group's options
            for group, state in _states(optimizer):
                if "step" in state:
                    state["step"] = torch.tensor(mine["steps"][group["id"]])
        _load_layers(Path(path if os.path.isdir(path) else os.path.dirname(path)), optimizer)

    around_checkpoints(engine, after_load, before_save)


def refuse_poet(engine: Any) -> None:
    """Have any other optimizer's engine refuse POET's checkpoints."""

    def after_load(path: str, client_state: dict[str, Any], wanted: bool) -> None:
        if KEY in client_state:
            raise ValueError(
                f"{path} was saved with POET, whose weights are W and rotations apart; load it with"
                " SpectralPOET, and take plain weights out of it with spectral_dist.poet.export"
            )

    around_checkpoints(engine, after_load)


def _states(optimizer: ShardedOptimizer) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group, tensors in optimizer.placement.param_batches(optimizer):
        for p in tensors:
            yield group, optimizer.state.get(p, {})


def _load_layers(folder: Path, optimizer: POET) -> None:
    """Every layer's W and ``_extra_state`` from DeepSpeed's files of a universal checkpoint.

    Of stages 0 to 2 one file has all of W, of stage 3 each rank's has a run of its elements.
    """
    with failing_together():
        saved = read_model_files(folder)
    module = saved[0]["module"]
    for layer in optimizer.layers:
        layer.set_extra_state(_of(module, f"{layer.key}._extra_state", folder))
        name = f"{layer.key}.weight"
        with optimizer.placement.gathered([layer.weight], write=True) as (weight,):
            whole = _of(module, name, folder)
            if whole.numel() != weight.numel():
                parts = [_of(s[_compat.FROZEN_PARAM_FRAGMENTS] or {}, name, folder) for s in saved]
                whole = torch.cat([part.flatten() for part in parts])[: weight.numel()]
            weight.copy_(whole.view_as(weight))


def _of(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise ValueError(
            f"the checkpoint {folder} has no {name}: it is of another model, or of its parts"
        )
    return tensors[name]
