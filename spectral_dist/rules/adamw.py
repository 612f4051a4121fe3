"""AdamW (arXiv 1711.05101, algorithm 2) for parameters that are no matrices.

The step is computed by torch's own functional form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from spectral_dist.rules.elementwise import widened


@dataclass(frozen=True)
class AdamWOptions:
    """The options of AdamW's step beside lr."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float


def update(
    options: AdamWOptions,
    lr: float,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    skip: Tensor | None = None,
) -> None:
    """Take one AdamW step in place.

    The step is elementwise, so that shards of any layout give the same numbers. Half-precision
    weights are updated in float32 and rounded once. On GPUs it is torch's fused kernel.

    Args:
        options: decays, eps and weight decay.
        lr: learning rate.
        weights: the parameters' shards, of any shapes.
        grads: of each weight, shaped as it.
        states: of each weight, ``exp_avg`` and ``exp_avg_sq`` (float32 or wider, shaped as it) and
            ``step`` (a 0-d float32 tensor on the CPU, of the steps before this one, each of its
            own).
        skip: 0-d float32 on the weights' device: 1 leaves all but ``step`` as it is. None: always
            update.
    """
    if not weights:
        return
    steps = [s["step"] for s in states]
    fused = skip is not None or weights[0].device.type != "cpu"
    if fused:
        torch._foreach_add_(steps, 1)
        counts = (torch.stack(steps) - 1).tolist()
        steps = _on_device(counts, weights[0].device)
    moments = [s["exp_avg"] for s in states]
    wide_weights = widened(weights, moments[0].dtype)
    adamw(
        wide_weights,
        widened(grads, moments[0].dtype),
        moments,
        [s["exp_avg_sq"] for s in states],
        [],
        steps,
        fused=fused or None,
        found_inf=skip,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )
    if wide_weights[0] is not weights[0]:
        torch._foreach_copy_(list(weights), wide_weights)


def _on_device(counts: Sequence[float], device: torch.device) -> list[Tensor]:
    """Return numbers as 0-d float32 tensors of a device, without waiting for it."""
    if len(set(counts)) == 1:
        return list(torch.full((len(counts),), counts[0], device=device).unbind())
    return [torch.full((), count, device=device) for count in counts]


def new_state(weight: Tensor) -> dict[str, Tensor]:
    """Return the state of a weight before its first step: zero moments in float32 or wider.

    The moments are float64 for float64 weights.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(weight, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(weight, dtype=dtype),
    }


class Update(Protocol):
    """The type of ``update``; one that cannot skip a step on the device takes no ``skip``."""

    def __call__(
        self,
        options: AdamWOptions,
        lr: float,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        skip: Tensor | None = None,
    ) -> None:
        """Take one AdamW step in place."""
