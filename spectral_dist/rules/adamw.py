"""AdamW (arXiv 1711.05101, algorithm 2) for parameters that are no matrices.

The step is computed by torch's own functional form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw


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
) -> None:
    """Take one AdamW step in place.

    The step is elementwise, so that shards of any layout give the same numbers. Half-precision
    weights are updated in float32 and rounded once.

    Args:
        options: decays, eps and weight decay.
        lr: learning rate.
        weights: the parameters' shards, of any shapes.
        grads: of each weight, shaped as it.
        states: of each weight, ``exp_avg`` and ``exp_avg_sq`` (float32 or wider, shaped as it) and
            ``step`` (a 0-d float32 tensor on the CPU, of the steps before this one).
    """
    wide_weights = [
        w if w.dtype == s["exp_avg"].dtype else w.to(s["exp_avg"].dtype)
        for w, s in zip(weights, states, strict=True)
    ]
    adamw(
        list(wide_weights),
        [g.to(w.dtype) for g, w in zip(grads, wide_weights, strict=True)],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )
    for weight, value in zip(weights, wide_weights, strict=True):
        if weight is not value:
            weight.copy_(value)


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


Update: TypeAlias = Callable[
    [AdamWOptions, float, Sequence[Tensor], Sequence[Tensor], Sequence[dict[str, Tensor]]], None
]
"""The type of ``update``: options, lr, weights, gradients and states."""
