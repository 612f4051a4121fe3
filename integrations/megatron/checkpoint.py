"""Megatron's checkpoints, its distributed ones too, with our optimizer inside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.integrations.megatron import _compat, matrix_checkpoint
from spectral_dist.integrations.megatron.foreign import refuse_foreign
from spectral_dist.integrations.megatron.optimizer import InsideMegatron
from spectral_dist.sharding import collectives

FORMAT = "distrib_optim_sharding_type"
RESHARDABLE = "fully_reshardable"
"""The format of the distributed optimizer's states that any tensor and data parallelism can load;
Megatron's own default is one that 0.19 can no longer write."""


def keep_checkpoints(leaf: Any, inner: InsideMegatron, copies: Collection[str]) -> None:
    """Have one of Megatron's optimizers save and load what ours needs.

    ``copies``: names of matrices that an earlier pipeline stage has, too.
    """
    sharded, load = leaf.sharded_state_dict, leaf.load_state_dict
    distributed = isinstance(leaf, DistributedOptimizer)
    states = inner.as_adam if distributed else contextlib.nullcontext
    within = False

    @functools.wraps(sharded)
    def sharded_state_dict(
        model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        inner.prepare()
        if distributed and not args and kwargs.get("sharding_type") is None:
            kwargs["metadata"] = {FORMAT: RESHARDABLE, **(kwargs.get("metadata") or {})}
        nonlocal within
        within = True  # the distributed optimizer loads inside of what it does to be loaded
        try:
            with inner.gathering(), states():
                found = sharded(model_sharded_state_dict, is_loading, *args, **kwargs)
        finally:
            within = False
        if isinstance(inner, SpectralOptimizer) and inner.keeps_matrix_state:
            parts = inner.matrix_parts()
            found[matrix_checkpoint.ENTRY] = matrix_checkpoint.sharded(parts, copies, is_loading)
        return found

    @functools.wraps(load)
    @torch.no_grad()
    def load_state_dict(state_dict: Any) -> Any:
        inner.prepare()
        if not within:
            refuse_foreign({"param_groups": [inner.mark()]}, state_dict)
        state_dict = dict(state_dict)
        found = state_dict.pop(matrix_checkpoint.ENTRY, {})
        if not within and isinstance(inner, SpectralOptimizer):
            error: Exception | None = None
            try:
                matrix_checkpoint.fill(inner.matrix_parts(), found)
            except ValueError as raised:
                error = raised
            collectives.raise_together(error, inner.placement.world_groups())
        with inner.gathering(), states():
            return load(state_dict)

    leaf.sharded_state_dict = sharded_state_dict
    leaf.load_state_dict = load_state_dict
    _compat.pair_groups_by(leaf, _as_they_are)


def _as_they_are(
    current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Megatron pairs groups by keys in which matrices and embeddings are alike, so one would get
    the other's; ours loads nothing from a group that is not in all of them, so any order will do.
    """
    if len(current) != len(saved):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, but there are {len(current)} here:"
            " build the optimizer with the options (matrices, scalars, overrides) it was saved with"
        )
    return list(saved)
