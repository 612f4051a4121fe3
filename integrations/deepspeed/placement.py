"""Where each ZeRO stage keeps its shards, as the model's own parameters show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat, _compat_groups
from spectral_dist.integrations.deepspeed.adam_moments import drop_moments
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement
from spectral_dist.placement.flat import in_one_sequence, in_own_runs
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.layout import Cut, Located


class ZeroPlacement(ReplicatedPlacement):
    """The placement of parameters under every ZeRO stage.

    - Stage 0: every rank has every parameter (float32 copies of it if the model is 16-bit).
    - Stages 1 and 2, and BF16_Optimizer: the parameters of a group lie in one flat tensor, each at
      the storage offset of the model's parameter; ranks store equal runs of that tensor.
      Those of experts are the ranks that have the same experts.
    - Stage 3: each parameter is cut into equal runs, one a rank. A sub-group's flat tensor holds
      this rank's runs of the sub-group's parameters, one after the other.

    DeepSpeed does not save matrix state; ``matrix_state`` saves it beside DeepSpeed's files.

    Args:
        engine: the DeepSpeedEngine, which may still be being built.
    """

    saves_matrix_state = True
    has_master_weights = True

    def __init__(self, engine: Any) -> None:
        # at stage 0 rank 0 alone saves, without a collective: it must have all momentum
        super().__init__(_compat.data_group(engine), replicate_momentum=True)
        self.engine = engine
        self.has_all_matrices = not (engine.pipeline_parallelism or engine.has_moe_layers)
        self._started = False
        self._options: list[dict[str, Any]] = []

    def start(self, optimizer: ShardedOptimizer) -> None:
        """Let the optimizer take steps from now on, and remember each group's options."""
        self._options = [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        self._started = True

    @property
    def is_ready(self) -> bool:
        """Return False until ``start``: FP16_UnfusedOptimizer calls step() while it is built."""
        return self._started

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Restore groups and states that the loading of a universal checkpoint has overwritten."""
        groups = optimizer.param_groups
        if self._started and len(groups) == len(self._options):
            for index, group in enumerate(groups):
                if group["id"] != index:  # stage 3 copies group 0's keys over all groups
                    group.update(self._options[index])
        for group in groups:
            for p in group["params"] if group["kind"] == "matrix" else ():
                drop_moments(optimizer, optimizer.state[p])

    def param_batches(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[ParamGroup, Sequence[Tensor]]]:
        """Iterate over (group, tensors): per sub-group at stage 3, else per parameter group.

        Stage 3 steps one sub-group at a time, as one flat tensor.
        """
        sub_groups = _compat.sub_groups(self.engine)
        if sub_groups is None:
            yield from super().param_batches(optimizer)
            return
        for flat, group_index in sub_groups:
            yield optimizer.param_groups[group_index], [flat]

    @contextmanager
    def gathered(self, tensors: Sequence[Tensor], *, write: bool = False) -> Iterator[list[Tensor]]:
        """Yield the model's tensors; stage 3 gathers them, and with ``write`` scatters them again.

        The values that it scatters are those of the first rank.
        """
        with GatheredParameters(list(tensors), modifier_rank=0 if write else None):
            yield [tensor.detach() for tensor in tensors]

    def cache_key(self, group: ParamGroup, tensors: Sequence[Tensor]) -> object:
        """Return a key of the sub-group at stage 3, the group's id at other stages."""
        return _compat.sub_group_ends(self.engine, tensors[0]) or group["id"]

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Raise for plain parameters that are not contiguous; flat tensors always are."""
        if self._are_whole(routes, tensors):
            super().check(routes, tensors)

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return one ``Located`` for the matrices of a group, or at stage 3 of a sub-group."""
        device = torch.device(get_accelerator().current_device_name())
        ends = _compat.sub_group_ends(self.engine, tensors[0])
        if ends is not None:
            return [_place_stage3(routes, tensors[0], ends, device)]
        ranks = _compat_groups.shard_group(self.engine, group)
        if self._are_whole(routes, tensors):
            return [replace(p, replicas=ranks) for p in super().locate(group, routes, tensors)]
        return [_place_flat(routes, tensors[0], ranks, device)]

    def _are_whole(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> bool:
        """Return whether the tensors are whole parameters, as at stage 0."""
        return [tuple(t.shape) for t in tensors] == [route.shape for route in routes]


def _place_flat(
    routes: Sequence[ParamSpec], flat: Tensor, group: dist.ProcessGroup, device: torch.device
) -> Located:
    """Locate parameters that lie in a flat tensor which ranks have cut into equal runs.

    Args:
        routes: of the parameters.
        flat: this rank's run of the flat tensor.
        group: the ranks that store the runs.
        device: where matrices are computed.

    Raises:
        RuntimeError: as in ``offset_in``.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    cut = Cut.even(flat.numel(), ranks)
    placed, spans = [], []
    for route in routes:
        parameter = route.parameter
        offset, numel = offset_in(flat, ranks, route), parameter.numel()
        placed.append((route, offset))
        begin, end = max(offset, cut.bounds[rank]), min(offset + numel, cut.bounds[rank + 1])
        if begin < end:
            spans.append((route.name, 0, begin - cut.bounds[rank], end - begin))
    layouts = in_one_sequence(placed, flat.numel(), ranks)
    return Located(tuple(layouts), group, device, tuple(spans), tensors=(0,))


def offset_in(flat: Tensor, ranks: int, route: ParamSpec) -> int:
    """Return the place of a parameter's first element in its ZeRO group's flat buffer.

    Args:
        flat: this rank's run of the buffer.
        ranks: the number of ranks that store a run.
        route: of the parameter.

    Raises:
        RuntimeError: the parameter is no view of the buffer.
    """
    data = route.parameter.data
    if data.untyped_storage().nbytes() < ranks * flat.numel() * data.itemsize:
        raise RuntimeError(
            f"{route.name} is no view of its ZeRO group's flat buffer of {ranks} x"
            f" {flat.numel()} elements, so where it lives is not known; was its .data replaced?"
        )
    return int(data.storage_offset())


def in_sub_group(routes: Sequence[ParamSpec], ends: tuple[int, int]) -> Sequence[ParamSpec]:
    """Return those of a group's parameters that are in a stage-3 sub-group.

    Args:
        routes: of the parameters of the whole group.
        ends: the ids of the sub-group's first and last parameter.
    """
    ids = [_compat.parameter_id(route.parameter) for route in routes]
    first, last = (ids.index(end) for end in ends)
    return routes[first : last + 1]


def _place_stage3(
    routes: Sequence[ParamSpec], flat: Tensor, ends: tuple[int, int], device: torch.device
) -> Located:
    """Locate the parameters of a stage-3 sub-group.

    Args:
        routes: of the parameters of the whole group.
        flat: this rank's runs of the sub-group's parameters, one after the other.
        ends: the ids of the sub-group's first and last parameter.
        device: where matrices are computed.

    Raises:
        RuntimeError: the runs do not add up to the flat tensor.
    """
    placed, spans, base, group, ranks = [], [], 0, None, 1
    for route in in_sub_group(routes, ends):
        group, run, numel = _compat.partition_of(route.parameter)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        placed.append((route, run))
        spans.append((route.name, 0, base, max(0, min(run, numel - rank * run))))
        base += run
    layouts, base = in_own_runs(placed, ranks)
    if base != flat.numel():
        raise RuntimeError(
            f"ZeRO-3 sub-group {ends} has {flat.numel()} elements, but its parameters sum to"
            f" {base}: its layout is not the one this release knows"
        )
    return Located(tuple(layouts), group, device, tuple(spans), tensors=(0,))
