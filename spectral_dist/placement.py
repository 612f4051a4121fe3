"""How a framework tells the core where parameters live, and the plain case: every rank has all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any, Protocol

from torch import Tensor

from spectral_dist.groups import Route
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.layout import Cut, Placement, lay

Located = tuple[Placement, tuple[int, ...]]
"""A placement, and which of the group's tensors it is of; its layouts count those from 0."""


class Placer(Protocol):
    """How a framework tells the core where the parameters of a group live."""

    partial: bool
    """whether a rank may have none of a group's tensors, and still has a part in its step"""
    beside: bool
    """whether the framework's checkpoints are given matrix state beside ``state_dict()``"""
    masters: bool
    """whether the model has copies of the parameters that it steps on, written after the step"""

    def prepare(self, optimizer: Any) -> bool:
        """Called first in every step; False means that this call is no step at all."""

    def steps(self, optimizer: Any) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        """What the framework steps on: each group with the tensors that it then has."""

    def key(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> object:
        """Equal for two calls of ``place`` that would give the same answer."""

    def place(
        self, group: dict[str, Any], routes: Sequence[Route], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Where the parameters of ``routes`` live, given the group's current tensors."""

    def whole(
        self, tensors: Sequence[Tensor], *, write: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """Parameters brought together for a while; ``write``: what is done to them, stays.

        Where that takes communication, a collective call, and all ranks write the same.
        """

    def everyone(self) -> list[Group]:
        """Groups that span the ranks which train the model together, one after the other."""

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank stores of a parameter or state: a plain tensor on the same memory."""

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """The part of a parameter's gradient that belongs to ``local(tensor)``."""


class WholeParameters:
    """Every rank of ``group`` has every parameter, as one process or DDP.

    ``everywhere``: whether every rank is to keep all momentum, and not the matrix's owner alone.
    """

    partial = False
    beside = False
    masters = False

    def __init__(self, group: Group = None, everywhere: bool = False) -> None:
        self.group, self.everywhere = group, everywhere
        self._wrapped: Group = None

    def prepare(self, optimizer: Any) -> bool:
        """Nothing to do."""
        return True

    def steps(self, optimizer: Any) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        """All groups at once."""
        for group in optimizer.param_groups:
            yield group, group["params"]

    def key(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> object:
        """A group's parameters never change."""
        return group["id"]

    def place(
        self, group: dict[str, Any], routes: Sequence[Route], tensors: Sequence[Tensor]
    ) -> list[Located]:
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
        replicas = self._replicas(routes)
        if replicas is None and group["kind"] == "matrix" and collectives.job_size() > 1:
            warnings.warn(
                "every rank of this job orthogonalizes all matrices by itself; if the ranks hold"
                " replicas, give param_groups the DistributedDataParallel model, or write"
                " process_group=torch.distributed.group.WORLD",
                stacklevel=5,
            )
        layouts = []
        for index, (route, tensor) in enumerate(zip(routes, tensors, strict=True)):
            check_contiguous(route, tensor)
            cut = Cut((0, tensor.numel()))
            layouts += [lay(m, cut, tensor=index) for m in route.matrices]
        pairs = enumerate(zip(routes, tensors, strict=True))
        spans = tuple((r.name, i, 0, t.numel()) for i, (r, t) in pairs)
        placement = Placement(
            tuple(layouts), None, tensors[0].device, spans, replicas, self.everywhere
        )
        return [(placement, tuple(range(len(tensors))))]

    def _replicas(self, routes: Sequence[Route]) -> Group:
        """The ranks that hold replicas: what the user said, or the model's DDP wrapper."""
        self._wrapped = routes[0].replicas
        return self._wrapped if self.group is None else self.group

    def whole(
        self, tensors: Sequence[Tensor], *, write: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """They are."""
        return nullcontext([tensor.detach() for tensor in tensors])

    def everyone(self) -> list[Group]:
        """The replicas."""
        return [self._wrapped if self.group is None else self.group]

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """Its ``grad``."""
        return tensor.grad


def check_contiguous(route: Route, local: Tensor) -> None:
    """ValueError if the parameter's elements do not lie in row-major order."""
    if not local.is_contiguous():
        raise ValueError(f"{route.name} is not contiguous; call .contiguous() on it first")
