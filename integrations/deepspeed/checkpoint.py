"""Make DeepSpeed's checkpoints, the universal one too, carry matrix state."""

from __future__ import annotations

from typing import Any

import torch

from spectral_dist.optimizer import SpectralOptimizer


def keep_checkpoints(optimizer: SpectralOptimizer) -> None:
    """The converter to universal checkpoints reads exp_avg_sq of every state: give it zeros.

    They have stride 0, so they cost no memory and no bytes on disk, and are dropped on load.
    """
    optimizer.register_state_dict_post_hook(_add_exp_avg_sq)
    optimizer.register_load_state_dict_pre_hook(_drop_exp_avg_sq)


def _matrix_states(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        state_dict["state"][i]
        for group in state_dict["param_groups"]
        if group["kind"] == "matrix"
        for i in group["params"]
        if i in state_dict["state"]
    ]


def _add_exp_avg_sq(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    # the inner dicts are the optimizer's own, so they are copied before anything is added
    state_dict = {**state_dict, "state": {k: dict(v) for k, v in state_dict["state"].items()}}
    for state in _matrix_states(state_dict):
        momentum = state["exp_avg"]
        state["exp_avg_sq"] = momentum.new_zeros(1).expand_as(momentum)
    return state_dict


def _drop_exp_avg_sq(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    state_dict = {**state_dict, "state": {k: dict(v) for k, v in state_dict["state"].items()}}
    for state in _matrix_states(state_dict):
        state.pop("exp_avg_sq", None)
    return state_dict
