"""The elementwise arithmetic that rules share, which a flag on the device can turn off.

On CPUs it is torch's foreach operators. On GPUs, and wherever a flag is given, it is one fused
kernel for many tensors, torch's own of SGD: it computes P <- P - lr (D + decay P), and returns
without a write if the flag is set, which the host need not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def average_(
    averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, skip: Tensor | None = None
) -> None:
    """Update running averages in place: A <- A + weight (V - A).

    Args:
        averages: on one device and of one dtype.
        values: of each average, shaped as it and of the same dtype.
        weight: of the new values.
        skip: 0-d float32 on the device; 1 leaves all averages as they are. None: always update.
    """
    if _is_fused(averages[0], skip):
        _subtract_(averages, values, -weight, -1.0, skip)
    else:
        torch._foreach_lerp_(list(averages), list(values), weight)


def decay_and_subtract_(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    rates: Sequence[float],
    decay: float,
    skip: Tensor | None = None,
) -> None:
    """Update weights in place: W <- (1 - decay) W - rate D.

    Args:
        weights: on one device and of one dtype.
        directions: of each weight, shaped as it and of the same dtype.
        rates: of each weight.
        decay: of all weights.
        skip: as in ``average_``.
    """
    if not _is_fused(weights[0], skip):
        torch._foreach_mul_(list(weights), 1 - decay)
        torch._foreach_sub_(list(weights), list(torch._foreach_mul(list(directions), list(rates))))
        return
    by_rate: dict[float, list[int]] = {}
    for i, rate in enumerate(rates):
        by_rate.setdefault(rate, []).append(i)
    for rate, indices in by_rate.items():
        # without a rate there is nothing to subtract: zeros then stand for the directions
        values = [directions[i] for i in indices]
        scaled = (rate, decay / rate) if rate else (decay, 1.0)
        if not rate:
            values = [torch.zeros_like(value) for value in values]
        _subtract_([weights[i] for i in indices], values, *scaled, skip)


def widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in a dtype: themselves if all have it, else copies of all, in one pass."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors if isinstance(tensors, list) else list(tensors)
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device)
    parts = torch.split(flat, [t.numel() for t in tensors])
    copies = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def _is_fused(like: Tensor, skip: Tensor | None) -> bool:
    """Return whether the fused kernel is used for tensors like this one."""
    return skip is not None or like.device.type != "cpu"


def _subtract_(
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    lr: float,
    decay: float,
    skip: Tensor | None,
) -> None:
    """Update in place: P <- P - lr (D + decay P)."""
    torch._fused_sgd_(
        list(params), list(values), [], weight_decay=decay, momentum=0.0, lr=lr, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False, grad_scale=None, found_inf=skip,
    )  # fmt: skip
