"""Counts the bytes of collectives where torch dispatches them, by the convention in traffic.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

RULES = {  # argument, a, b: a (P - 1) / P^b of its bytes
    **dict.fromkeys(("allreduce_", "all_reduce", "all_reduce_"), (0, 2, 1)),
    "_reduce_scatter_base_": (1, 1, 1),
    "reduce_scatter_tensor": (0, 1, 1),
    **dict.fromkeys(("_allgather_base_", "allgather_"), (1, 1, 0)),
    "reduce_scatter_tensor_coalesced_": (1, 1, 1),
    "all_gather_into_tensor": (0, 1, 0),
    "allgather_into_tensor_coalesced_": (1, 1, 0),
    **dict.fromkeys(("broadcast_", "reduce_"), (0, 1, 1)),
}


class DispatchedTraffic(TorchDispatchMode):
    """Collectives and the bytes that this rank sends in them, counted where torch dispatches them.

    NotImplementedError: a collective without a rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch first; what that calls comes back here
        name = func.overloadpacket.__name__
        skip = ("wait_tensor", "_wrap_tensor_autograd", "barrier")
        if func.namespace in ("c10d", "_c10d_functional") and name not in skip:
            self.calls[name] += 1
            self.bytes[name] += round(self._sent(name, args))
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple[Any, ...]) -> float:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if name in ("alltoall_base_", "all_to_all_single"):
            given, splits = (args[1], args[4]) if name == "alltoall_base_" else (args[0], args[2])
            share = 1 - splits[rank] / max(1, sum(splits)) if splits else (ranks - 1) / ranks
            return share * given.nbytes
        if name == "alltoall_":  # outputs, inputs
            return sum(t.nbytes for r, t in enumerate(args[1]) if r != rank)
        if name == "gather_":  # outputs, inputs, group, root
            return 0 if rank == args[3] else args[1][0].nbytes
        if name == "scatter_":
            return args[0][0].nbytes * (ranks - 1) if rank == args[3] else 0
        if name not in RULES:
            raise NotImplementedError(f"{name}: its bytes are not counted yet")
        argument, times, power = RULES[name]
        given = args[argument]
        tensors = [given] if isinstance(given, Tensor) else given
        return times * (ranks - 1) / ranks**power * sum(t.nbytes for t in tensors)
