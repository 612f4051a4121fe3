"""Adam's moments in the states that DeepSpeed saves, for its converter to universal checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_moments(optimizer: ShardedOptimizer) -> None:
    """Add the Adam moments that a rule does not have to saved states, as zeros; drop them on load.

    DeepSpeed's converter to universal checkpoints reads both moments of every parameter's state.
    The zeros have stride 0, so they cost no memory and no bytes on disk.
    """
    optimizer.register_state_dict_post_hook(_add_moments)
    optimizer.register_load_state_dict_pre_hook(_drop_moments)


def drop_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Remove from a matrix's state the Adam moments that its rule does not have, in place."""
    assert isinstance(optimizer, SpectralOptimizer)
    for name in MOMENTS[int(optimizer.has_momentum) :]:
        state.pop(name, None)


def _with_copied_states(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a copy, its states copied too: the inner dicts are the optimizer's own."""
    return {**state_dict, "state": {k: dict(v) for k, v in state_dict["state"].items()}}


def _matrix_keys(state_dict: dict[str, Any]) -> list[int]:
    """Return the keys of the states of matrices."""
    return [
        i
        for group in state_dict["param_groups"]
        if group["kind"] == "matrix"
        for i in group["params"]
        if i in state_dict["state"]
    ]


def _add_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict with zeros for the moments that matrices do not have."""
    state_dict = _with_copied_states(state_dict)
    keys = [i for group in state_dict["param_groups"] for i in group["params"]]
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    param_of = dict(zip(keys, params, strict=True))
    for i in _matrix_keys(state_dict):
        zeros = torch.zeros(1, device=param_of[i].device).expand(param_of[i].shape)
        for name in MOMENTS:
            state_dict["state"][i].setdefault(name, zeros)
    return state_dict


def _drop_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict without the moments that matrices do not have."""
    state_dict = _with_copied_states(state_dict)
    for i in _matrix_keys(state_dict):
        drop_moments(optimizer, state_dict["state"][i])
    return state_dict
