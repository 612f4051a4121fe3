"""Where each ZeRO stage keeps its shards, read off the model's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor

from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.deepspeed.adam_moments import drop_moments
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.layout import Cut, Located, flat_layout


class ZeroPlacement(ReplicatedPlacement):
    """Every ZeRO stage's layout.

    Matrix state is saved beside what DeepSpeed saves (``matrix_state``).

    - stage 0: every rank has every parameter (in float32 copies when the model is 16-bit).
    - stages 1 and 2, and BF16_Optimizer: a group's parameters lie in one flat tensor, at the
      storage offset of the model's parameter, cut into equal runs by rank.
    - stage 3: a sub-group's flat tensor holds, one after the other, this rank's run of each of its
      parameters, each cut into equal runs by rank.
    """

    saves_matrix_state = True
    has_master_weights = True

    def __init__(self, engine: Any) -> None:
        # DeepSpeed saves rank 0's state only at stage 0, without a collective
        super().__init__(_compat.data_group(engine), replicate_momentum=True)
        self.engine = engine
        self._started = False
        self._options: list[dict[str, Any]] = []

    def start(self, optimizer: ShardedOptimizer) -> None:
        """Take steps from now on; remember each group's options."""
        self._options = [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        self._started = True

    @property
    def is_ready(self) -> bool:
        """Return False while the engine is built: FP16_UnfusedOptimizer then calls step() once."""
        return self._started

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Undo what loading a universal checkpoint does to groups and states."""
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
        """Iterate over sub-groups at stage 3, which steps on one at a time, else over groups."""
        sub_groups = _compat.sub_groups(self.engine)
        if sub_groups is None:
            yield from super().param_batches(optimizer)
            return
        for flat, group in sub_groups:
            yield optimizer.param_groups[group], [flat]

    @contextmanager
    def gathered(self, tensors: Sequence[Tensor], *, write: bool = False) -> Iterator[list[Tensor]]:
        """Yield the model's own: at stage 3 gathered, the first rank's values scattered again."""
        with GatheredParameters(list(tensors), modifier_rank=0 if write else None):
            yield [tensor.detach() for tensor in tensors]

    def cache_key(self, group: ParamGroup, tensors: Sequence[Tensor]) -> object:
        """Return the sub-group at stage 3, the group elsewhere."""
        return _compat.ends_of(self.engine, tensors[0]) or group["id"]

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Raise for plain parameters that are not contiguous; flat tensors always are."""
        if self._are_whole(routes, tensors):
            super().check(routes, tensors)

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return the layouts of the group's (or stage 3's sub-group's) matrices."""
        device = torch.device(get_accelerator().current_device_name())
        ends = _compat.ends_of(self.engine, tensors[0])
        if ends is not None:
            return [_place_stage3(routes, tensors[0], ends, device)]
        if self._are_whole(routes, tensors):
            return super().locate(group, routes, tensors)
        assert self.group is not None
        return [_place_flat(routes, tensors[0], self.group, device)]

    def _are_whole(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> bool:
        return [tuple(t.shape) for t in tensors] == [route.shape for route in routes]


def _place_flat(
    routes: Sequence[ParamSpec], flat: Tensor, group: dist.ProcessGroup, device: torch.device
) -> Located:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    cut = Cut.even(flat.numel(), ranks)
    layouts, spans = [], []
    for route in routes:
        parameter = route.parameter
        offset, numel = int(parameter.data.storage_offset()), parameter.numel()
        if parameter.data.untyped_storage().nbytes() < ranks * flat.numel() * parameter.itemsize:
            raise RuntimeError(
                f"{route.name} is no view of its ZeRO group's flat buffer of {ranks} x"
                f" {flat.numel()} elements, so where it lives is not known; was its .data replaced?"
            )
        layouts += [flat_layout(matrix, cut, offset=offset) for matrix in route.matrices]
        begin, end = max(offset, cut.bounds[rank]), min(offset + numel, cut.bounds[rank + 1])
        if begin < end:
            spans.append((route.name, 0, begin - cut.bounds[rank], end - begin))
    return Located(tuple(layouts), group, device, tuple(spans), tensors=(0,))


def _place_stage3(
    routes: Sequence[ParamSpec], flat: Tensor, ends: tuple[int, int], device: torch.device
) -> Located:
    ids = [_compat.id_of(route.parameter) for route in routes]
    first, last = (ids.index(end) for end in ends)
    base, layouts, spans, group = 0, [], [], None
    for route in routes[first : last + 1]:
        group, run, numel = _compat.run_of(route.parameter)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        cut = Cut.even(run, ranks)
        layouts += [flat_layout(matrix, cut, base=base) for matrix in route.matrices]
        spans.append((route.name, 0, base, max(0, min(run, numel - rank * run))))
        base += run
    if base != flat.numel():
        raise RuntimeError(
            f"ZeRO-3 sub-group {ends} has {flat.numel()} elements, but its parameters sum to"
            f" {base}: its layout is not the one this release knows"
        )
    return Located(tuple(layouts), group, device, tuple(spans), tensors=(0,))
