"""Saving and loading of Megatron's optimizers, distributed ones too, with ours inside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from spectral_dist._error_help import explained
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.integrations.megatron import _compat, matrix_checkpoint
from spectral_dist.integrations.megatron.foreign import refuse_foreign
from spectral_dist.integrations.megatron.optimizer import MegatronInnerOptimizer
from spectral_dist.sharding import collectives

FORMAT_KEY = "distrib_optim_sharding_type"
"""The key in Megatron's metadata of the format of the distributed optimizer's states."""
RESHARDABLE = "fully_reshardable"
"""The format of the distributed optimizer's states that any tensor and data parallelism can load.

Megatron's own default is a format that 0.19 can no longer write.
"""


def wrap_checkpointing(
    leaf: Any, inner: MegatronInnerOptimizer, copied_matrices: Collection[str]
) -> None:
    """Wrap the methods by which one of Megatron's optimizers saves and loads, for what ours needs.

    Args:
        leaf: Megatron's optimizer of one kind of parameters (dense ones, or experts).
        inner: ours, inside of it.
        copied_matrices: names of matrices that another pipeline stage holds as well, and saves.
    """
    sharded, load = leaf.sharded_state_dict, leaf.load_state_dict
    distributed = isinstance(leaf, DistributedOptimizer)
    state_context = inner.adam_states if distributed else contextlib.nullcontext
    is_nested = False

    @functools.wraps(sharded)
    @explained
    def sharded_state_dict(
        model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        inner.prepare()
        if distributed and not args and kwargs.get("sharding_type") is None:
            kwargs["metadata"] = {FORMAT_KEY: RESHARDABLE, **(kwargs.get("metadata") or {})}
        nonlocal is_nested
        is_nested = True  # where it is_loading, the distributed optimizer calls load_state_dict
        try:
            with inner.collective_state_dict(), state_context():
                state_dict = sharded(model_sharded_state_dict, is_loading, *args, **kwargs)
        finally:
            is_nested = False
        if isinstance(inner, SpectralOptimizer) and inner.keeps_matrix_state:
            parts = inner.matrix_parts()
            entry = matrix_checkpoint.sharded(parts, copied_matrices, is_loading)
            state_dict[matrix_checkpoint.ENTRY] = entry
        return state_dict

    @functools.wraps(load)
    @explained
    @torch.no_grad()
    def load_state_dict(state_dict: Any) -> Any:
        inner.prepare()
        if not is_nested:
            refuse_foreign({"param_groups": [inner.saved_identity()]}, state_dict)
        state_dict = dict(state_dict)
        matrix_state = state_dict.pop(matrix_checkpoint.ENTRY, {})
        if not is_nested and isinstance(inner, SpectralOptimizer):
            error: Exception | None = None
            try:
                matrix_checkpoint.fill(inner.matrix_parts(), matrix_state)
            except ValueError as raised:
                error = raised
            collectives.raise_together(error, inner.placement.world_groups())
        with inner.collective_state_dict(), state_context():
            return load(state_dict)

    leaf.sharded_state_dict = sharded_state_dict
    leaf.load_state_dict = load_state_dict
    _compat.match_groups_by(leaf, _match_in_order)


def _match_in_order(
    current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Match the optimizer's groups with the saved ones in the order of the latter.

    Megatron matches groups by a few keys, in which those of matrices and of embeddings may be
    alike, so that one would get the other's. Ours loads from a group only what is the same in all
    of them, so any order is right.

    Args:
        current: the groups that the optimizer has.
        saved: those in the checkpoint.

    Raises:
        ValueError: there are more of one than of the other.
    """
    if len(current) != len(saved):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, but there are {len(current)} here:"
            " build the optimizer with the options (matrices, scalars, overrides) it was saved with"
        )
    return list(saved)
