"""Counts the bytes that every torch.distributed call sends, whoever makes it.

The convention, for one of P ranks that hands over n bytes, whatever gloo happens to do:

    all_reduce                                           2 (P-1)/P n
    reduce_scatter (n: whole input), reduce, broadcast     (P-1)/P n
    all_gather (n: own contribution)                       (P-1) n
    all_to_all                                             what goes to other ranks
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch.distributed as dist

RULES = {  # argument, a, b: a (P-1) / P^b of its bytes
    "all_reduce": ("tensor", 2, 1),
    "reduce": ("tensor", 1, 1),
    "broadcast": ("tensor", 1, 1),
    "reduce_scatter_tensor": ("input", 1, 1),
    "all_gather": ("tensor", 1, 0),
    "all_gather_into_tensor": ("input_tensor", 1, 0),
    "all_to_all_single": ("input", 1, 1),
}
OTHERS = "all_reduce_coalesced all_gather_coalesced reduce_scatter all_to_all gather scatter send"


class Traffic:
    """Bytes by collective while ``on``. Make it before deepspeed is imported.

    DeepSpeed keeps references to some of the functions, and torch's helpers look them up in
    distributed_c10d: both get the wrapped ones. NotImplementedError: a call that has no rule.
    """

    def __init__(self) -> None:
        self.on = False
        self.bytes: Counter[str] = Counter()
        for name in (*RULES, *OTHERS.split()):
            wrapped = self._wrap(name, getattr(dist.distributed_c10d, name))
            setattr(dist.distributed_c10d, name, wrapped)
            setattr(dist, name, wrapped)

    def _wrap(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                if name not in RULES:
                    raise NotImplementedError(f"{name}: its bytes are not counted yet")
                argument, times, power = RULES[name]
                given = inspect.signature(function).bind(*args, **kwargs).arguments
                ranks, rank = (f(given.get("group")) for f in (dist.get_world_size, dist.get_rank))
                share = times * (ranks - 1) / ranks**power
                if splits := given.get("input_split_sizes"):
                    share = 1 - splits[rank] / max(1, sum(splits))
                self.bytes[name] += round(share * given[argument].nbytes)
            return function(*args, **kwargs)

        return counted
