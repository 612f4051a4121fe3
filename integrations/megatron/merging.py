"""When POET's rotations are merged: after Megatron's step has written the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from spectral_dist.integrations.megatron.inner import SpectralPOET


def keep_merging(built: Any, config: Any, chunks: Sequence[nn.Module]) -> None:
    """Have Megatron's optimizer merge in the steps that are due, and clip by the ramp.

    A step that Megatron skips (an overflow, too large a norm) neither counts nor merges.
    """
    leaves = getattr(built, "chained_optimizers", [built])
    poets = [leaf.optimizer for leaf in leaves if isinstance(leaf.optimizer, SpectralPOET)]
    for poet in poets:
        poet.placement.has_master_weights = True
    step, step_with_ready_grads = built.step, built.step_with_ready_grads

    @functools.wraps(step_with_ready_grads)
    def step_and_merge() -> Any:
        done = step_with_ready_grads()
        if any(poet.is_due() for poet in poets):
            gather_parameters(chunks)
            for poet in poets:
                poet.merge_if_due()
        return done

    @functools.wraps(step)
    def clipped_step() -> Any:
        limit = config.clip_grad
        config.clip_grad = limit * min((poet.clip_factor() for poet in poets), default=1.0)
        try:
            return step()
        finally:
            config.clip_grad = limit

    built.step_with_ready_grads, built.step = step_and_merge, clipped_step


def gather_parameters(chunks: Sequence[nn.Module]) -> None:
    """Finish what the next forward pass would else gather. A collective call of data ranks."""
    for chunk in chunks:
        settings: Any = getattr(chunk, "ddp_config", None)
        if getattr(settings, "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
