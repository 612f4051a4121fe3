"""Where each engine puts parameters and optimizer state on every rank of a job that does not run.

Layouts come from the functions that training uses; what is added here is which of them an engine
takes, with which numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from spectral_dist.estimate.job import Job
from spectral_dist.estimate.megatron import MegatronPlan
from spectral_dist.estimate.megatron_model import MegatronModel
from spectral_dist.estimate.placed import PlacedUnit, simulated, state_dtype
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.flat import in_one_sequence, in_own_runs, whole
from spectral_dist.placement.mesh_sharding import stored_stack_boxes
from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.layout import Layout, Located, StackBoxes, grid_layout

__all__ = ["PlacedUnit", "TensorPlan", "place", "state_dtype"]

REPLICATE, SHARD, TENSOR = 0, 1, 2
"""Dimensions of the mesh of torch's engines."""
ALIGNMENT = 2
"""ZeRO-1 and 2 pad a group to a multiple of this times the ranks (nccl_start_alignment_factor)."""


def place(
    job: Job,
    routes: Sequence[ParamSpec],
    replicate_momentum: bool,
    plan: TensorPlan | MegatronPlan,
) -> Iterator[PlacedUnit]:
    """Yield the units of a parameter group.

    Args:
        job: the engine and its ranks.
        routes: the specs of the group's parameters.
        replicate_momentum: the option of that name.
        plan: which parameters tensor parallelism cuts, and Megatron's stages and buffers.
    """
    stage = job.zero_stage
    if isinstance(plan, MegatronPlan):
        yield from plan.place(routes, replicate_momentum)
    elif job.engine == "ddp" or stage == 0:
        yield _replicated(job, routes, replicate_momentum or stage == 0)
    elif stage is None:
        yield from _on_mesh(job, routes, plan)
    elif stage < 3:
        yield _one_sequence(job, routes)
    else:
        for sub_group in _sub_groups(job, routes):
            yield _own_runs(job, sub_group)


def built_as(model: nn.Module, job: Job) -> nn.Module:
    """Return a model as the engine builds it: Megatron has modules of its own.

    Args:
        model: of transformers, if the engine is megatron.
        job: the engine and its ranks.

    Raises:
        ValueError: a model that Megatron's are not known for.
    """
    if job.engine != "megatron":
        return model
    return MegatronModel(getattr(model, "config", None), job)


def places_of(model: nn.Module, job: Job, specs: Sequence[ParamSpec]) -> TensorPlan | MegatronPlan:
    """Return what ``place`` has to know of a model beside its groups.

    Args:
        model: that ``built_as`` has returned.
        job: the engine and its ranks.
        specs: of all parameters of the model.

    Raises:
        ValueError: as in ``TensorPlan.of_model``.
    """
    if isinstance(model, MegatronModel):
        return MegatronPlan(job, model, specs)
    return TensorPlan.of_model(model, [spec.name for spec in specs], job.tensor)


def _unit(
    job: Job,
    layouts: Sequence[Layout],
    stored: Tensor,
    num_tensors: int,
    replicas: Group = None,
    replicate_momentum: bool = False,
) -> PlacedUnit:
    """Return a unit that all ranks of a job without a mesh share or have copies of."""
    ranks = torch.arange(job.ranks)
    zeros = torch.zeros_like(ranks)
    is_copied = replicas is not None
    located = Located(
        tuple(layouts), None if is_copied else simulated(job.ranks), job.device, (), replicas,
        replicate_momentum, tuple(range(num_tensors)),
    )  # fmt: skip
    rank_of, replica_of = (zeros, ranks) if is_copied else (ranks, zeros)
    number = torch.tensor(num_tensors)
    return PlacedUnit(located, stored, number, rank_of, replica_of, state_dtype(job))


def _replicated(job: Job, routes: Sequence[ParamSpec], replicate_momentum: bool) -> PlacedUnit:
    """Return the unit of parameters that every rank has whole."""
    stored = torch.tensor([sum(math.prod(route.shape) for route in routes)])
    replicas = simulated(job.ranks)
    return _unit(job, whole(routes), stored, len(routes), replicas, replicate_momentum)


def _one_sequence(job: Job, routes: Sequence[ParamSpec]) -> PlacedUnit:
    """Return the unit of a group that ZeRO-1 or 2 has made one flat tensor of."""
    placed, offset = [], 0
    for route in routes:
        placed.append((route, offset))
        offset += math.prod(route.shape)
    run = -(-offset // (ALIGNMENT * job.ranks)) * ALIGNMENT
    layouts = in_one_sequence(placed, run, job.ranks)
    return _unit(job, layouts, torch.tensor([run]).expand(job.ranks), 1)


def _sub_groups(job: Job, routes: Sequence[ParamSpec]) -> Iterator[list[tuple[ParamSpec, int]]]:
    """Yield ZeRO-3's sub-groups: each parameter, with the elements of it that a rank stores."""
    sub_group: list[tuple[ParamSpec, int]] = []
    numel = 0
    for route in routes:
        run = -(-math.prod(route.shape) // job.ranks)
        sub_group.append((route, run))
        numel += run
        if numel >= job.sub_group:
            yield sub_group
            sub_group, numel = [], 0
    if sub_group:
        yield sub_group


def _own_runs(job: Job, placed: Sequence[tuple[ParamSpec, int]]) -> PlacedUnit:
    """Return the unit of a sub-group of ZeRO-3."""
    layouts, run = in_own_runs(placed, job.ranks)
    return _unit(job, layouts, torch.tensor([run]).expand(job.ranks), 1)


@dataclass(frozen=True)
class TensorPlan:
    """Which dimension of each parameter tensor parallelism cuts, by the parameter's name.

    Attributes:
        axes: {name: 0 or 1}; the others have a copy on each tensor-parallel rank.
    """

    axes: dict[str, int]

    @classmethod
    def of_model(cls, model: nn.Module, names: Sequence[str], tensor: int) -> TensorPlan:
        """Return the plan that transformers has for a model's layers.

        Args:
            model: whose config has a ``base_model_tp_plan``.
            names: of its parameters.
            tensor: the number of tensor-parallel ranks; one needs no plan.

        Raises:
            ValueError: there is no plan, or one with styles that torch's DTensors do not have.
        """
        if tensor == 1:
            return cls({})
        config: Any = getattr(model, "config", None)
        styles: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
        if not styles:
            raise ValueError(
                f"tp is {tensor}, but transformers has no base_model_tp_plan for"
                f" {type(model).__name__}; leave tp out"
            )
        prefix = re.escape(f"{getattr(model, 'base_model_prefix', '')}.")
        axes: dict[str, int] = {}
        for pattern, style in styles.items():
            text = re.escape(pattern).replace(r"\*", r"\d+")
            matched = [n for n in names if re.fullmatch(rf"(?:{prefix})?{text}(?:\.weight)?", n)]
            if style not in ("colwise", "rowwise") and matched:
                raise ValueError(
                    f"tp is {tensor}, but {matched[0]} is {style!r} in the model's"
                    " base_model_tp_plan; only colwise and rowwise are estimated, so leave tp out"
                )
            axes |= {name: int(style == "rowwise") for name in matched}
        return cls(axes)


def _on_mesh(job: Job, routes: Sequence[ParamSpec], plan: TensorPlan) -> Iterator[PlacedUnit]:
    """Yield the units of FSDP2's parameters: those that tensor parallelism cuts, and the others."""
    for is_cut in (True, False):
        subset = [route for route in routes if (route.name in plan.axes) == is_cut]
        if subset:
            yield _mesh_unit(job, subset, plan, is_cut)


def _mesh_unit(job: Job, routes: Sequence[ParamSpec], plan: TensorPlan, is_cut: bool) -> PlacedUnit:
    """Return the unit of parameters that are cut by FSDP2 and, if ``is_cut``, by tp before it."""
    sizes = tuple(
        (dim, size) for dim, size in ((SHARD, job.shard), (TENSOR, job.tensor * is_cut)) if size > 1
    )
    dims = [dim for dim, _ in sizes]
    ranks = math.prod(size for _, size in sizes)
    layouts: list[Layout] = []
    stored = torch.zeros(ranks, dtype=torch.int64)
    for index, route in enumerate(routes):
        cuts = [(SHARD, 0)] if SHARD in dims else []
        if TENSOR in dims:
            cuts.insert(0, (TENSOR, plan.axes[route.name]))
        boxes = stored_stack_boxes(route, sizes, tuple(cuts))
        stored += _numels(boxes)
        layouts += [grid_layout(m, route.stack, boxes, 0, index) for m in route.matrices]
    coordinates = torch.cartesian_prod(
        *(torch.arange(size) for size in (job.replicate, job.shard, job.tensor))
    )
    tensor_copies = 1 if is_cut else job.tensor
    rank_of = coordinates[:, SHARD]
    replica_of = coordinates[:, REPLICATE]
    if is_cut:
        rank_of = rank_of * job.tensor + coordinates[:, TENSOR]
    else:
        replica_of = replica_of * job.tensor + coordinates[:, TENSOR]
    located = Located(
        tuple(layouts), simulated(ranks), job.device, (),
        simulated(job.replicate * tensor_copies), True, tuple(range(len(routes))),
    )  # fmt: skip
    number = torch.tensor(len(routes))
    return PlacedUnit(located, stored, number, rank_of, replica_of, state_dtype(job))


@lru_cache(maxsize=1024)
def _numels(boxes: StackBoxes) -> Tensor:
    """Return the elements of each rank's box."""
    edges = torch.tensor(boxes)
    return (edges[..., 1] - edges[..., 0]).prod(-1)
