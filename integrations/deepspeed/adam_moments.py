"""Make DeepSpeed's checkpoints, the universal one too, carry momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def keep_checkpoints(optimizer: ShardedOptimizer) -> None:
    """The converter to universal checkpoints reads Adam's moments of every state: give it zeros.

    They have stride 0, so they cost no memory and no bytes on disk, and are dropped on load.
    """
    optimizer.register_state_dict_post_hook(_add_moments)
    optimizer.register_load_state_dict_pre_hook(_drop_moments)


def drop_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take out of a matrix's state the moments that its rule has not."""
    assert isinstance(optimizer, SpectralOptimizer)
    for name in MOMENTS[int(optimizer.has_momentum) :]:
        state.pop(name, None)


def _copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """With states of its own: the inner dicts are the optimizer's, and must stay as they are."""
    return {**state_dict, "state": {k: dict(v) for k, v in state_dict["state"].items()}}


def _matrix_keys(state_dict: dict[str, Any]) -> list[int]:
    return [
        i
        for group in state_dict["param_groups"]
        if group["kind"] == "matrix"
        for i in group["params"]
        if i in state_dict["state"]
    ]


def _add_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = _copied(state_dict)
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    flat: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = dict(zip(saved, flat, strict=True))
    for i in _matrix_keys(state_dict):
        zeros = torch.zeros(1, device=shapes[i].device).expand(shapes[i].shape)
        for name in MOMENTS:
            state_dict["state"][i].setdefault(name, zeros)
    return state_dict


def _drop_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = _copied(state_dict)
    for i in _matrix_keys(state_dict):
        drop_moments(optimizer, state_dict["state"][i])
    return state_dict
