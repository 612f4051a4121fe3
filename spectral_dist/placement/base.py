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
from spectral_dist.placement.flat import whole
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Located

ParamGroup = dict[str, Any]
"""One of torch's parameter groups, into which schedulers and frameworks write."""


class Placement(ABC):
    """Tell an optimizer where the parameters of its groups live.

    It is given to the optimizer as ``placement=``. The order of calls: ``prepare`` first in every
    step; ``world_groups``, ``check`` and ``locate`` in the first step that has the parameters.

    Attributes:
        may_lack_params: whether a rank that has none of a group's tensors still takes part in the
            group's step.
        saves_matrix_state: whether the framework's checkpoints save matrix state themselves, so
            that ``state_dict()`` leaves it out.
        knows_blocks: whether layouts say which blocks tensor parallelism has cut, so that strategy
            'auto' may leave matrices in slabs.
        has_master_weights: whether the stepped parameters are master weights, which the framework
            copies into the model's parameters after the step.
        has_all_matrices: whether every rank knows of all matrices of the job, and not of those of
            its pipeline stage or its experts only.
    """

    may_lack_params = False
    saves_matrix_state = False
    has_master_weights = False
    knows_blocks = False
    has_all_matrices = True

    @property
    def is_ready(self) -> bool:
        """Return whether steps are to be taken: False while the framework is still being built.

        Some call ``step`` as early as that.
        """
        return True

    def prepare(  # noqa: B027  most placements have nothing to do here
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Bring the placement up to date with the optimizer's groups; called first in every step.

        Args:
            optimizer: as it is now.
            routes: the specs of all its parameters.
            meter: counts the bytes that the placement sends.
        """

    def param_batches(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[ParamGroup, Sequence[Tensor]]]:
        """Iterate over what the framework steps on: each group with the tensors it then has."""
        for group in optimizer.param_groups:
            yield group, group["params"]

    def cache_key(self, group: ParamGroup, tensors: Sequence[Tensor]) -> object:
        """Return a hashable key that is equal for calls of ``locate`` with the same answer."""
        return group["id"]

    @abstractmethod
    def world_groups(self) -> list[Group]:
        """Return groups that span the ranks which step together, one after the other.

        They are known before anything is located, and the same on all these ranks.
        """

    def check(  # noqa: B027  some placements accept any parameter
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

        Args:
            group: the parameter group.
            routes: the specs of its parameters.
            tensors: its tensors, one for each spec unless the framework steps on others.

        Returns:
            One ``Located`` for all parameters that are sharded alike.
        """

    @abstractmethod
    def gathered(
        self, tensors: Sequence[Tensor], *, write: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """Return a context in which parameters are whole; with ``write`` changes are kept.

        Where that takes communication it is a collective call, and all ranks write the same values.
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
        """Take the process group of the model's DDP wrapper, unless the user gave one.

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
            shape = None if tensor is None else tuple(tensor.shape)
            if route is None or shape != route.shape:
                raise ValueError(
                    f"{route.name if route else 'a parameter'} is now {shape} but was"
                    f" {route.shape if route else None} when the optimizer was built, so something"
                    " shards it. With DeepSpeed, write `import"
                    " spectral_dist.integrations.deepspeed` before deepspeed.initialize"
                )
            check_contiguous(route, tensor)

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return one ``Located``, in which this rank stores every parameter whole."""
        if self.replicas is None and group["kind"] == "matrix" and collectives.job_size() > 1:
            warnings.warn(
                "every rank of this job orthogonalizes all matrices by itself; if the ranks hold"
                " replicas, give param_groups the DistributedDataParallel model, or write"
                " process_group=torch.distributed.group.WORLD",
                stacklevel=5,
            )
        spans = [
            (route.name, index, 0, tensor.numel())
            for index, (route, tensor) in enumerate(zip(routes, tensors, strict=True))
        ]
        located = Located(
            tuple(whole(routes)),
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
        """Return a context that yields the parameters unchanged: they are whole already."""
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
