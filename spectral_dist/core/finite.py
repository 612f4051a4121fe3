"""Gradients that are not finite, and the step that is not taken because of them.

On CPUs the host looks before it changes anything. On GPUs that would make it wait in every step
until the backward pass has ended. There a flag on the device guards all that a step writes, and the
host reads it when the next step begins (``LastStep``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_dist._host_copy import HostCopy
from spectral_dist.core.units import Unit

SMALL = 4096
"""Gradients up to this many elements are looked at together on CPUs, twice as many at a time."""
LATER_ON = ("cuda", "xpu")
"""The kinds of devices on which the host reads a step's flag when the next step begins."""
NEWS, BAD = 1.0, 2.0
"""What a rank tells the others: it has something to say; the step must not be taken."""


def norms_of(grads: Sequence[Tensor], each: bool) -> Tensor | None:
    """Return numbers that are all finite exactly if the gradients are (sums would overflow).

    Args:
        grads: not empty; there may be none.
        each: whether there is one number for each gradient, as there always is on GPUs.
    """
    if not grads:
        return None
    if each or grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(grads), ord=math.inf))
    # on CPUs the norm takes twenty times as long, and each call for a small one more than its work
    extremes: list[Tensor] = []
    small: list[Tensor] = []
    size = 0
    for grad in grads:
        if grad.numel() > SMALL:
            extremes += torch.aminmax(grad)
            continue
        if small and (grad.dtype != small[0].dtype or size + grad.numel() > 2 * SMALL):
            extremes += torch.aminmax(torch.cat(small))  # not of all at once, which takes memory
            small, size = [], 0
        small.append(grad.reshape(-1))
        size += grad.numel()
    if small:
        extremes += torch.aminmax(torch.cat(small))
    return torch.stack(extremes)


def not_finite(units: Sequence[Unit], grads: Sequence[Sequence[Tensor | None]]) -> list[str]:
    """Return the names of parameters whose gradient on this rank has NaN or infinity in it.

    Args:
        units: that are stepped.
        grads: of each unit's tensors.
    """
    names = []
    for unit, unit_grads in zip(units, grads, strict=True):
        for name, index, start, numel in unit.located.spans:
            grad = unit_grads[index]
            if grad is not None:
                part = grad.reshape(-1)[start : start + numel]
                if not bool(part.isfinite().all()):
                    names.append(name)
    return names


@dataclass
class LastStep:
    """A step whose flag the host has yet to read.

    Attributes:
        skip: 0-d float32 on the device: 1 if the step must not change anything, else 0.
        flags: [largest of ``NEWS`` and ``BAD`` of any rank, largest number, largest minus number].
        norms: the largest magnitude of each of this rank's gradients, on the device; None if it
            has none.
        names: of the parameters in each of these gradients.
        undo: called if the step was skipped: takes back what the host has counted.
    """

    skip: Tensor
    flags: HostCopy
    norms: Tensor | None
    names: Sequence[Sequence[str]]
    undo: list[Callable[[], object]] = field(default_factory=list)

    def read(self) -> tuple[bool, bool]:
        """Return whether any rank has something to say, and whether the step was skipped.

        Waits until the device has come to the beginning of that step.
        """
        level, largest, smallest = self.flags.values().tolist()
        differs = largest != -smallest
        return bool(level) or differs, level >= BAD or differs

    def bad_names(self) -> list[str]:
        """Return the parameters whose gradient on this rank was not finite; waits."""
        if self.norms is None:
            return []
        finite = self.norms.isfinite().tolist()
        return [n for names, ok in zip(self.names, finite, strict=True) if not ok for n in names]

    def take_back(self) -> None:
        """Take back what the host has counted of a step that was skipped."""
        for undo in self.undo:
            undo()


def skip_flag(flags: Tensor) -> Tensor:
    """Return 1, 0-d float32, if the reduced flags say that the step must not be taken, else 0."""
    level, largest, smallest = flags.unbind()
    return ((level >= BAD) | (largest != -smallest)).float()
