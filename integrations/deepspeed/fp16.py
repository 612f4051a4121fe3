"""Repair of fp16 at ZeRO stage 0: deepspeed 0.19.8 divides by a loss scale it never applied.

``engine.backward`` scales the loss only for ZeRO's own optimizers, while the stage-0 wrapper
divides the gradients by the scale all the same. They arrive 65536 times too small: AdamW's eps
then dwarfs them, clipping never acts, and small gradients underflow as if nothing were scaled.
"""

from __future__ import annotations

import functools
from typing import Any

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor


def scale_loss_at_stage0(engine: Any) -> None:
    """Make this engine's ``backward`` apply the loss scale that its ``step`` divides by."""
    wrapper = engine.optimizer
    if not isinstance(wrapper, FP16_UnfusedOptimizer) or not engine.fp16_enabled():
        return
    backward = engine.backward

    @functools.wraps(backward)
    def scaled(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = wrapper.loss_scale_config.cur_scale
        returned: Tensor = backward(loss.float() * scale, *args, **kwargs) / scale
        return returned

    engine.backward = scaled
