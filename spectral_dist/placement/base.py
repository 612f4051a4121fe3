"""How a framework tells the core where parameters live, and the plain case: every rank has all."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Cut, Located, flat_layout

ParamGroup = dict[str, Any]
"""A parameter group of torch's: schedulers and frameworks write into it."""


class Placement(ABC):
    """Tell an optimizer where the parameters of its groups live.

    Handed to the optimizer as ``placement=``. The order of calls: ``prepare`` first in every step;
    ``world_groups``, ``check`` and ``locate`` when parameters are met for the first time.

    Attributes:
        may_lack_params: whether a rank may have none of a group's tensors, and still has a part in
            its step.
        saves_matrix_state: whether the framework's checkpoints are given matrix state beside
            ``state_dict()``.
        knows_blocks: whether layouts say which blocks tensor parallelism has cut, so that strategy
            'auto' may leave matrices in slabs.
        has_master_weights: whether the model has copies of the parameters that are stepped, written
            after the step.
    """

    may_lack_params = False
    saves_matrix_state = False
    has_master_weights = False
    knows_blocks = False

    @property
    def is_ready(self) -> bool:
        """Return False while a framework that calls ``step`` early is being built."""
        return True

    def prepare(  # noqa: B027  most have nothing to look at
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Look at the optimizer's groups as they are now; called first in every step."""

    def param_batches(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[ParamGroup, Sequence[Tensor]]]:
        """Iterate over what the framework steps on: each group with the tensors it then has."""
        for group in optimizer.param_groups:
            yield group, group["params"]

    def cache_key(self, group: ParamGroup, tensors: Sequence[Tensor]) -> object:
        """Return what is equal for two calls of ``locate`` that would give the same answer."""
        return group["id"]

    @abstractmethod
    def world_groups(self) -> list[Group]:
        """Return groups that span the ranks which step together, one after the other.

        Known before anything is located; the same on all these ranks.
        """

    def check(  # noqa: B027  some take any
        self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> None:
        """Raise for parameters that cannot be located, without asking another rank.

        Raises:
            ValueError: names the parameter; every rank then raises.
        """

    @abstractmethod
    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return where the parameters of ``routes`` live, given the group's current tensors.

        A collective call of ``world_groups``. Layouts are equal on all ranks of their group.
        """

    @abstractmethod
    def gathered(
        self, tensors: Sequence[Tensor], *, write: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """Bring parameters together for a while; with ``write`` what is done to them stays.

        Where that takes communication it is a collective call, and all ranks write the same.
        """

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this rank stores of a parameter or state: a tensor on the same memory."""
        return tensor

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """Return the part of a parameter's gradient that belongs to ``local(tensor)``."""
        return tensor.grad


class ReplicatedPlacement(Placement):
    """Every rank of a group has every parameter, as in one process or under DDP.

    Args:
        group: the ranks that hold replicas; None: those of the DistributedDataParallel that the
            parameters were found in, or this process alone.
        replicate_momentum: whether every rank keeps all momentum, and not the matrix's owner alone.
    """

    def __init__(self, group: Group = None, replicate_momentum: bool = False) -> None:
        self.group, self.replicate_momentum = group, replicate_momentum
        self._ddp_group: Group = None

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Find the group of the model's DDP wrapper.

        Raises:
            ValueError: the wrapper is inside of torch's Join.
        """
        if self.group is None and routes:
            self._ddp_group = routes[0].replicas
            reference = routes[0].wrapper
            wrapper = None if reference is None else reference()
            if wrapper is not None and collectives.size(self._ddp_group) > 1:
                _check_join(wrapper)

    @property
    def replicas(self) -> Group:
        """Return the ranks that hold replicas: what the user said, or the model's DDP wrapper."""
        return self._ddp_group if self.group is None else self.group

    def world_groups(self) -> list[Group]:
        """Return the replicas."""
        return [self.replicas]

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Raise for a parameter that something has sharded, or that is not contiguous."""
        for route, tensor in zip_longest(routes, tensors):
            now = None if tensor is None else tuple(tensor.shape)
            if route is None or now != route.shape:
                raise ValueError(
                    f"{route.name if route else 'a parameter'} is now {now} but was"
                    f" {route.shape if route else None} when the optimizer was built, so something"
                    " shards it. With DeepSpeed, write `import"
                    " spectral_dist.integrations.deepspeed` before deepspeed.initialize"
                )
            check_contiguous(route, tensor)

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return one run per parameter."""
        if self.replicas is None and group["kind"] == "matrix" and collectives.job_size() > 1:
            warnings.warn(
                "every rank of this job orthogonalizes all matrices by itself; if the ranks hold"
                " replicas, give param_groups the DistributedDataParallel model, or write"
                " process_group=torch.distributed.group.WORLD",
                stacklevel=5,
            )
        layouts, spans = [], []
        for index, (route, tensor) in enumerate(zip(routes, tensors, strict=True)):
            cut = Cut((0, tensor.numel()))
            layouts += [flat_layout(m, cut, tensor=index) for m in route.matrices]
            spans.append((route.name, index, 0, tensor.numel()))
        located = Located(
            tuple(layouts),
            None,
            tensors[0].device,
            tuple(spans),
            self.replicas,
            self.replicate_momentum,
            tuple(range(len(tensors))),
        )
        return [located]

    def gathered(
        self, tensors: Sequence[Tensor], *, write: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """Yield the parameters: they are whole."""
        return nullcontext([tensor.detach() for tensor in tensors])


def check_contiguous(route: ParamSpec, local: Tensor) -> None:
    """Raise a ValueError if the elements lie neither in row-major order nor as channels_last."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(local.ndim)
    if not local.is_contiguous() and not (
        channels_last and local.is_contiguous(memory_format=channels_last)
    ):
        raise ValueError(f"{route.name} is not contiguous; call .contiguous() on it first")


def _check_join(wrapper: DistributedDataParallel) -> None:
    """Raise a ValueError if some ranks may run out of inputs, and take no further steps."""
    config = getattr(wrapper, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise ValueError(
            "the model is inside of torch's Join, where a rank without further inputs takes no"
            " step, but every step of this optimizer is one of all ranks. Write Join([model],"
            " throw_on_early_termination=True), which ends all ranks with the first; or build the"
            " optimizer of param_groups(model.module), so that each rank takes all steps alone"
        )
