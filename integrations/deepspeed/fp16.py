"""Repair of fp16 at ZeRO stage 0, where DeepSpeed divides by a loss scale it never applied.

``engine.backward`` of 0.19.0 to 0.19.8 scales the loss only for ZeRO's own optimizers, while the
stage-0 wrapper divides the gradients by the scale all the same. They arrive 65536 times too small:
AdamW's eps then dwarfs them, clipping never acts, and small gradients underflow as if nothing were
scaled. Whether an engine has the fault is measured in its first backward pass, not concluded from
its version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectral_dist.integrations.deepspeed import _compat

PROBE_SCALE = 2.0**100
"""The loss scale while the first backward pass begins: one over a number of micro-batches, the only
other factor on the loss, is never mistaken for it."""


def scale_loss_at_stage0(engine: Any) -> None:
    """Make this engine's ``backward`` apply the loss scale that its ``step`` divides by.

    The scale is applied exactly once, by DeepSpeed or by this wrapper. Engines other than those of
    stage 0 in fp16 are left as they are.
    """
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
    """A backward pass with correct gradients that finds out whether DeepSpeed scales the loss.

    DeepSpeed begins it under ``PROBE_SCALE``. The gradient that reaches the loss shows whether that
    scale was applied, and is multiplied so that the true scale is in it. Nothing runs twice, and
    the loss scale is the true one again afterwards.
    """

    def __init__(self, loss_scale: _compat.LossScale) -> None:
        self.loss_scale = loss_scale
        self.true_scale = loss_scale.cur_scale
        self.applies: bool | None = None

    def run(
        self, backward: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run ``backward`` on the loss, and return what it returns.

        Raises:
            RuntimeError: ``backward`` did not use the loss, or scaled it by an unknown factor.
        """
        watched = loss.float() * 1.0  # float32 can hold the scale; not the user's own tensor
        watched.register_hook(self._correct)  # type: ignore[no-untyped-call]
        self.loss_scale.cur_scale = PROBE_SCALE
        try:
            returned = backward(watched, *args, **kwargs)
        finally:
            self.loss_scale.cur_scale = self.true_scale
        if self.applies is None:
            raise RuntimeError("engine.backward(loss) has not gone through the loss it was given")
        return returned

    def _correct(self, gradient: Tensor) -> Tensor:
        """Note whether the gradient was scaled, and return it times the true scale."""
        factor = float(gradient)  # 1, or one over the number of micro-batches, times the scale
        if not 0 < factor <= 1 and not PROBE_SCALE**0.5 < factor <= PROBE_SCALE:
            raise RuntimeError(
                f"fp16 at ZeRO stage 0: engine.backward multiplies the loss by {factor:g}, which is"
                " neither its loss scale nor 1; use ZeRO stage 1, or bf16"
            )
        self.applies = factor > 1
        rest = self.true_scale / PROBE_SCALE if self.applies else self.true_scale
        return gradient * rest
