"""Repair of fp16 at ZeRO stage 0, where a DeepSpeed divides by a loss scale it never applied.

``engine.backward`` of 0.19.0 to 0.19.8 scales the loss only for ZeRO's own optimizers, while the
stage-0 wrapper divides the gradients by the scale all the same. They arrive 65536 times too small:
AdamW's eps then dwarfs them, clipping never acts, and small gradients underflow as if nothing were
scaled. Whether an engine has the fault is seen in its first backward pass, not known by its number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectral_dist.integrations.deepspeed import _compat

MARK = 2.0**100
"""The loss scale while the first backward pass begins: no number of micro-batches looks like it."""


def scale_loss_at_stage0(engine: Any) -> None:
    """Make this engine's ``backward`` apply the loss scale that its ``step`` divides by, once."""
    loss_scale = _compat.loss_scale_at_stage0(engine)
    if loss_scale is None:
        return
    backward: Callable[..., Tensor] = engine.backward
    applies: bool | None = None
    """Whether DeepSpeed applies the scale itself; None before the first backward pass."""

    @functools.wraps(backward)
    def scaled(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal applies
        if applies is None:
            probe = _Probe(loss_scale)
            returned = probe.run(backward, loss, *args, **kwargs)
            applies = probe.applies
            return returned
        if applies:
            return backward(loss, *args, **kwargs)
        scale = loss_scale.cur_scale
        return backward(loss.float() * scale, *args, **kwargs) / scale

    engine.backward = scaled


class _Probe:
    """One backward pass with the right gradients, whichever way DeepSpeed goes about it.

    It runs under a loss scale that cannot be mistaken, and what reaches the loss tells whether it
    was applied; from there on the true scale is. Nothing is run twice, and no state is left behind.
    """

    def __init__(self, loss_scale: _compat.LossScale) -> None:
        self.loss_scale = loss_scale
        self.true = loss_scale.cur_scale
        self.applies: bool | None = None

    def run(
        self, backward: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return what ``backward`` returns; raise RuntimeError if it did neither."""
        watched = loss.float() * 1.0  # float32, which holds the mark, and no tensor of the user's
        watched.register_hook(self._correct)  # type: ignore[no-untyped-call]
        self.loss_scale.cur_scale = MARK
        try:
            returned = backward(watched, *args, **kwargs)
        finally:
            self.loss_scale.cur_scale = self.true
        if self.applies is None:
            raise RuntimeError("engine.backward(loss) has not gone through the loss it was given")
        return returned

    def _correct(self, gradient: Tensor) -> Tensor:
        factor = float(gradient)  # 1, or one over the number of micro-batches, times the scale
        if not 0 < factor <= 1 and not MARK**0.5 < factor <= MARK:
            raise RuntimeError(
                f"fp16 at ZeRO stage 0: engine.backward multiplies the loss by {factor:g}, which is"
                " neither its loss scale nor 1; use ZeRO stage 1, or bf16"
            )
        self.applies = factor > 1
        return gradient * (self.true / MARK) if self.applies else gradient * self.true
