"""How a framework tells the core where parameters live, and the plain case: every rank has all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from spectral_dist.groups import Route
from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.layout import Cut, Placement, lay


class Placer(Protocol):
    """How a framework tells the core where the parameters of a group live."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> bool:
        """Called first in every step; False means that this call is no step at all."""

    def key(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> object:
        """Equal for two calls of ``place`` that would give the same answer."""

    def place(
        self, group: dict[str, Any], routes: Sequence[Route], tensors: Sequence[Tensor]
    ) -> Placement:
        """Where the parameters of ``routes`` live, given the group's current tensors."""


class WholeParameters:
    """The default placer: every rank of ``group`` has every parameter, as one process or DDP."""

    def __init__(self, group: Group = None) -> None:
        self.group = group

    def prepare(self, optimizer: torch.optim.Optimizer) -> bool:
        """Nothing to do."""
        return True

    def key(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> object:
        """A group's parameters never change."""
        return group["id"]

    def place(
        self, group: dict[str, Any], routes: Sequence[Route], tensors: Sequence[Tensor]
    ) -> Placement:
        """One run per parameter."""
        for route, tensor in zip_longest(routes, tensors):
            now = None if tensor is None else tuple(tensor.shape)
            if route is None or now != route.shape:
                raise ValueError(
                    f"{route.name if route else 'a parameter'} is now {now} but was"
                    f" {route.shape if route else None} when the optimizer was built, so something"
                    " shards it. With DeepSpeed, write `import"
                    " spectral_dist.integrations.deepspeed` before deepspeed.initialize"
                )
        layouts = []
        for index, (route, tensor) in enumerate(zip(routes, tensors, strict=True)):
            if not tensor.is_contiguous():
                raise ValueError(f"{route.name} is not contiguous; call .contiguous() on it first")
            cut = Cut((0, tensor.numel()))
            layouts += [lay(m, cut, tensor=index, replicated=True) for m in route.matrices]
        pairs = enumerate(zip(routes, tensors, strict=True))
        spans = tuple((r.name, i, 0, t.numel()) for i, (r, t) in pairs)
        return Placement(tuple(layouts), self.group, tensors[0].device, spans)
