"""A meter of live tensor bytes: what a piece of code has allocated and not yet freed."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CREATED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)
"""Ops whose argument is new: torch.tensor() makes it out of the dispatcher's sight."""

PATIENCE = 0.002
"""Seconds that the threads of collectives get to let go of tensors."""


class Live(TorchDispatchMode):
    """Bytes of tensor storages, above what was alive when the ``with`` block began.

    Each storage counts once, whatever views there are of it, from the op that returns it until it
    is freed: the last tensor on it is gone, here or in a collective that still holds it. A storage
    that an op gets before any op has returned it was there before; that it is freed counts as well
    (``bytes`` may be below 0), and so does its change of size. Not seen: what an op allocates and
    frees within itself (LAPACK's work space, what gloo packs). A collective that is over may still
    hold its tensors for an instant, until its thread runs again: a new peak waits for that.

    Attributes:
        bytes: now.
        peak: the most there has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._collectives = False
        self._sizes: dict[int, int] = {}
        """of storages seen, by their address in C++"""
        self._ends: list[weakref.finalize[Any, Any]] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for end in self._ends:
            end.detach()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch first; what that calls comes back here
        given = storages((args, kwargs))
        if func not in CREATED:
            for storage in given:
                if storage._cdata not in self._sizes:
                    self._watch(storage, storage.nbytes())
        out = func(*args, **(kwargs or {}))
        for storage in (*given, *storages(out)):
            if storage._cdata not in self._sizes:
                self._watch(storage, 0)
            self.bytes += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
        self._collectives |= func.namespace in ("c10d", "_c10d_functional")
        if self.bytes > self.peak:
            if self._collectives:
                time.sleep(PATIENCE)
            self.peak = max(self.peak, self.bytes)
        return out

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        # the Python object of a storage lives as long as the storage, whoever holds that
        self._sizes[storage._cdata] = size
        self._ends.append(weakref.finalize(storage, self._freed, storage._cdata))

    def _freed(self, address: int) -> None:
        self.bytes -= self._sizes.pop(address)


def storages(found: Any) -> list[torch.UntypedStorage]:
    """Of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def distinct_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages that the tensors lie in, each once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())
