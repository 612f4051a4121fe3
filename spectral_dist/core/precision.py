"""The dtypes of a step are the code's own, whatever a user's autocast says around it."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.ExitStack:
    """Turn autocast off inside, on the CPU and on this device."""
    stack = contextlib.ExitStack()
    for kind in {"cpu", device.type}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
