"""The merge of POET's rotations, which comes after Megatron's step has written the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron.optimizer import SpectralPOET


def merge_after_steps(built: Any, config: Any, chunks: Sequence[nn.Module]) -> None:
    """Make Megatron's optimizer merge after steps in which that is due, and clip by the ramp.

    A step that Megatron skips (an overflow, too large a norm) is not counted, and merges nothing.

    Args:
        built: what Megatron's ``get_megatron_optimizer`` has returned, with our optimizers inside.
        config: its OptimizerConfig, whose ``clip_grad`` is changed during each step.
        chunks: this rank's parts of the model.
    """
    optimizers = [leaf.optimizer for leaf in _compat.leaves(built)]
    poets = [optimizer for optimizer in optimizers if isinstance(optimizer, SpectralPOET)]
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

    _compat.call_after_update(built, merge)
    built.step = clipped_step


def gather_parameters(chunks: Sequence[nn.Module]) -> None:
    """Gather the parameters that the next forward pass would otherwise gather.

    With overlap_param_gather it is a collective call of the data-parallel ranks.
    """
    for chunk in chunks:
        _compat.finish_param_gathers(chunk)
