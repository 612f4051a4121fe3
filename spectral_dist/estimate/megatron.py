"""Where Megatron-core puts a model's parameters and optimizer state on every rank of a job."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spectral_dist.estimate.job import Job
from spectral_dist.estimate.megatron_model import MegatronModel, Weight
from spectral_dist.estimate.placed import PlacedUnit, simulated, state_dtype
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.tiles import (
    FlatRange,
    even_pieces,
    flat_cuts,
    sharing,
    tiles_of,
    whole_cuts,
    whole_piece,
)
from spectral_dist.sharding.layout import Layout, Located

PARAMETER, BUCKET = 64, 128
"""The distributed optimizer begins parameters, and ends buckets, at multiples of these elements."""


@dataclass(frozen=True)
class RankSets:
    """The ranks that hold the same parameters, or several such sets of ranks.

    Attributes:
        tensor, data: the numbers of tensor- and data-parallel ranks of each set.
        ranks: (sets, data, tensor), of the job.
    """

    tensor: int
    data: int
    ranks: Tensor

    @property
    def joint_ranks(self) -> list[range]:
        """Return [t][d]: the rank in its set of tensor rank t and data rank d."""
        return [range(t, self.tensor * self.data, self.tensor) for t in range(self.tensor)]


class MegatronPlan:
    """The stage, experts' ranks, tile and place in Megatron's buffers of every parameter.

    Args:
        job: with engine megatron.
        model: its model.
        specs: of the model's parameters.
    """

    def __init__(self, job: Job, model: MegatronModel, specs: Sequence[ParamSpec]) -> None:
        self.job, self.model = job, model
        self.numel: dict[int, int] = {}
        self.flat: dict[int, FlatRange] = {}
        self._buffers: dict[tuple[int, int | None], int] = {}
        by_buffer: dict[tuple[int, int | None], list[ParamSpec]] = {}
        for spec in specs:
            by_buffer.setdefault(self._where(model.weight(spec)), []).append(spec)
        for where, members in by_buffer.items():
            for spec in members:
                tiles = 1 if model.weight(spec).cut is None else self._grid([where]).tensor
                self.numel[id(spec.parameter)] = math.prod(spec.shape) // tiles
            self._buffers[where] = self._fill(where, members)

    @property
    def stages(self) -> range:
        """Return the pipeline stages."""
        return range(self.job.pipeline)

    def _where(self, weight: Weight) -> tuple[int, int | None]:
        """Return the stage of a parameter, and its rank among those that have experts.

        That is None for what all of them have; if there is one, experts are as other parameters.
        """
        job, experts = self.job, None
        if weight.expert is not None and job.expert > 1:
            experts = weight.expert * job.expert // self.model.num_experts
        return weight.stage(self.model.num_layers, job.pipeline), experts

    def _fill(self, where: tuple[int, int | None], members: Sequence[ParamSpec]) -> int:
        """Place parameters in one of Megatron's buffers, and return its number of elements."""
        numels = [self.numel[id(spec.parameter)] for spec in members]
        if not self.job.distributed_optimizer:
            return sum(numels)
        shared = [self.model.weight(spec).is_shared for spec in members]
        bucket = None if where[0] else self.job.bucket  # later stages have one bucket
        flat, numel = in_buckets(numels, shared, self._grid([where]).data, bucket)
        self.flat |= {id(spec.parameter): one for spec, one in zip(members, flat, strict=True)}
        return numel

    def _grid(self, sets: Sequence[tuple[int, int | None]]) -> RankSets:
        """Return the ranks of some stages, or of some of their experts.

        Megatron counts ranks along tensor, expert, data and pipeline parallelism, in this order.
        """
        job = self.job
        counted = torch.arange(job.ranks)
        if sets[0][1] is None:
            ranks = counted.view(job.pipeline, job.data, job.tensor)
            return RankSets(job.tensor, job.data, ranks[[stage for stage, _ in sets]])
        tensor = job.expert_tensor or job.tensor
        data = job.data * job.tensor // (job.expert * tensor)
        ranks = counted.view(job.pipeline, data, job.expert, tensor).transpose(1, 2)
        stages, experts = zip(*sets, strict=True)
        return RankSets(tensor, data, ranks[list(stages), list(experts)])

    @cached_property
    def buffer_numel(self) -> Tensor:
        """Return the elements of Megatron's buffers on each rank, padding included."""
        numel = torch.zeros(self.job.ranks, dtype=torch.int64)
        for where, count in self._buffers.items():
            numel[self._grid([where]).ranks.flatten()] += count
        return numel

    @cached_property
    def num_agreements(self) -> Tensor:
        """Return how many of each rank's optimizers agree with other ranks before a step.

        Experts have one of their own.
        """
        number = torch.zeros(self.job.ranks, dtype=torch.int64)
        for where in self._buffers:
            grid = self._grid([where])
            number[grid.ranks.flatten()] += int(grid.tensor * grid.data > 1)
        return number

    def place(self, routes: Sequence[ParamSpec], replicate_momentum: bool) -> Iterator[PlacedUnit]:
        """Yield the units of a parameter group: tiles, and matrices that no tensor rank cuts.

        Args:
            routes: the specs of the group's parameters.
            replicate_momentum: the option of that name.
        """
        subsets: dict[tuple[int, int | None, bool], list[ParamSpec]] = {}
        for route in routes:
            weight = self.model.weight(route)
            is_cut = weight.cut is not None and self._grid([self._where(weight)]).tensor > 1
            tiled = is_cut or route.kind != "matrix"  # AdamW steps the others where they lie
            subsets.setdefault((*self._where(weight), tiled), []).append(route)
        alike: dict[Hashable, list[tuple[int, int | None, bool]]] = {}
        for (stage, experts, tiled), subset in subsets.items():
            key = (experts is None, tiled, *map(self._lies, subset))
            alike.setdefault(key, []).append((stage, experts, tiled))
        for sets in alike.values():
            grid = self._grid([(stage, experts) for stage, experts, _ in sets])
            yield self._unit(subsets[sets[0]], grid, sets[0][2], replicate_momentum)

    def _lies(self, route: ParamSpec) -> Hashable:
        """Return what is equal for parameters that lie alike."""
        weight = self.model.weight(route)
        matrices = tuple((m.shape, m.blocks, m.transposed) for m in route.matrices)
        flat = self.flat.get(id(route.parameter))
        return route.shape, weight.cut, weight.stride, matrices, flat

    def _unit(
        self, routes: Sequence[ParamSpec], grid: RankSets, tiled: bool, replicate_momentum: bool
    ) -> PlacedUnit:
        """Return the unit of parameters of a grid's sets of ranks."""
        is_flat = self.job.distributed_optimizer
        tensor, data = simulated(grid.tensor), simulated(grid.data)
        joint = simulated(grid.tensor * grid.data)
        group, replicas, replicated = sharing(
            tiled, is_flat, tensor, data, lambda: joint, replicate_momentum
        )
        layouts, (stored, num_tensors) = [], self._stored(routes, grid.data)
        for index, route in enumerate(routes):
            weight, numel = self.model.weight(route), self.numel[id(route.parameter)]
            if is_flat:
                joint_ranks = grid.joint_ranks if tiled else [range(grid.data)]
                cuts = flat_cuts(numel, self.flat[id(route.parameter)], joint_ranks)
            else:
                cuts = whole_cuts([numel] * (grid.tensor if tiled else 1))
            pieces = whole_piece(numel, route.shape[-1])
            if route.matrices and len(cuts) > 1 and weight.cut is not None:
                pieces = even_pieces(route.name, route.shape, weight.cut, weight.stride, len(cuts))
            layouts += [Layout(m, tuple(tiles_of(m, pieces, cuts, index))) for m in route.matrices]
        located = Located(
            tuple(layouts), group, self.job.device, (), replicas, replicated,
            tuple(range(len(routes))),
        )  # fmt: skip
        d, t = torch.meshgrid(torch.arange(grid.data), torch.arange(grid.tensor), indexing="ij")
        both, none = d * grid.tensor + t, torch.zeros_like(d)
        if is_flat:
            rank, replica = (both, none) if tiled else (d, t)
            by_rank = d.flatten() if tiled else torch.arange(grid.data)
            stored, num_tensors = stored[by_rank], num_tensors[by_rank]
        else:
            rank, replica = (t, d) if tiled else (none, both)
        rank_of, replica_of = (torch.full((self.job.ranks,), -1) for _ in range(2))
        rank_of[grid.ranks] = rank.expand_as(grid.ranks)
        replica_of[grid.ranks] = replica.expand_as(grid.ranks)
        dtype = state_dtype(self.job)
        return PlacedUnit(located, stored, num_tensors, rank_of, replica_of, dtype)

    def _stored(self, routes: Sequence[ParamSpec], data: int) -> tuple[Tensor, Tensor]:
        """Return the elements, and the number, of parameters' tensors by data-parallel rank.

        Without the distributed optimizer all have the same: (1,) of each.
        """
        numels = [self.numel[id(route.parameter)] for route in routes]
        if not self.job.distributed_optimizer:
            return torch.tensor([sum(numels)]), torch.tensor([len(routes)])
        stored, number = (torch.zeros(data, dtype=torch.int64) for _ in range(2))
        for route, numel in zip(routes, numels, strict=True):
            first, bounds = self.flat[id(route.parameter)].bounds(numel)
            run = slice(first, first + len(bounds) - 1)
            stored[run] += torch.tensor(bounds).diff()
            number[run] += 1
        return stored, number


def in_buckets(
    numels: Sequence[int], is_shared: Sequence[bool], data: int, bucket: int | None
) -> tuple[list[FlatRange], int]:
    """Return where the distributed optimizer puts parameters, and the elements of its buffer.

    The last parameter comes first. Buckets end at multiples that all data-parallel ranks divide
    evenly; one of the two copies of a tied embedding has a bucket of its own.

    Args:
        numels: of the parameters, in the model's order.
        is_shared: whether each is such a copy.
        data: the number of data-parallel ranks.
        bucket: elements from which on a bucket is full; None: never.
    """
    ends, starts, position = [0], [], 0
    multiple, buckets = math.lcm(data, BUCKET), []

    def close(at: int) -> int:
        """End the bucket, and return where the next one begins."""
        ends.append(-(-at // multiple) * multiple)
        return ends[-1]

    for numel, shared in zip(reversed(numels), reversed(is_shared), strict=True):
        position = -(-position // PARAMETER) * PARAMETER
        if shared and position > ends[-1]:
            position = close(position)
        starts.append(position)
        buckets.append(len(ends) - 1)
        position += numel
        if shared or (bucket is not None and position - ends[-1] >= bucket):
            position = close(position)
    if position > ends[-1]:
        close(position)
    flat = [
        FlatRange(start - ends[k], (ends[k + 1] - ends[k]) // data)
        for start, k in zip(starts, buckets, strict=True)
    ]
    return flat[::-1], ends[-1]
