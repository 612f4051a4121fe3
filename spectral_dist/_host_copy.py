"""Numbers on their way from a GPU to the host, which need not wait for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on the host, begun without waiting for the tensor's device.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: Any = None
        if tensor.device.type == "cpu":
            self._values = tensor.clone()
            return
        self._values = tensor.to("cpu", non_blocking=True)  # torch makes it in pinned memory
        self._arrived = torch.get_device_module(tensor.device).Event()
        self._arrived.record()

    def is_here(self) -> bool:
        """Return whether ``values`` would not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def values(self) -> Tensor:
        """Return the values on the host; wait until the device has come to the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._values
