"""When POET's rotations are merged: after Megatron's step has written the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron.optimizer import SpectralPOET


def keep_merging(built: Any, config: Any, chunks: Sequence[nn.Module]) -> None:
    """Have Megatron's optimizer merge in the steps that are due, and clip by the ramp.

    A step that Megatron skips (an overflow, too large a norm) neither counts nor merges.
    """
    inside = [leaf.optimizer for leaf in _compat.leaves(built)]
    poets = [optimizer for optimizer in inside if isinstance(optimizer, SpectralPOET)]
    for poet in poets:
        poet.placement.has_master_weights = True
    step = built.step

    def merge() -> None:
        if any(poet.is_due() for poet in poets):
            gather_parameters(chunks)
            for poet in poets:
                poet.merge_if_due()

    @functools.wraps(step)
    def clipped_step() -> Any:
        limit = config.clip_grad
        config.clip_grad = limit * min((poet.clip_factor() for poet in poets), default=1.0)
        try:
            return step()
        finally:
            config.clip_grad = limit

    _compat.after_update(built, merge)
    built.step = clipped_step


def gather_parameters(chunks: Sequence[nn.Module]) -> None:
    """Finish what the next forward pass would else gather. A collective call of data ranks."""
    for chunk in chunks:
        _compat.finish_gathers(chunk)
