"""Where DTensor parameters live: FSDP2, HSDP, tensor parallelism and any of them together.

Everything is read off the parameters. A mesh dimension that shards a parameter cuts its matrices;
one that replicates it holds copies, of which one does the work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement, check_contiguous
from spectral_dist.sharding.collectives import Group, Meter, all_equal, sum_ranks
from spectral_dist.sharding.layout import Located, StackBox, StackBoxes, grid_layout


@dataclass(frozen=True)
class Spread:
    """How a parameter lies on the mesh that the model spans.

    ``cuts``: (mesh dimension, tensor dimension), from the first cut on. ``copied``: the other mesh
    dimensions of more than one rank that the parameter itself knows; ``implied``: those that only
    other parameters know, over which it has copies if its values are equal there.
    """

    cuts: tuple[tuple[int, int], ...]
    copied: tuple[int, ...]
    implied: tuple[int, ...]


class MeshPlacement(ReplicatedPlacement):
    """DTensor parameters where their mesh says; plain ones whole on every rank.

    The model spans the widest mesh that a parameter has. One that knows only some of its dimensions
    (FSDP beside tensor parallelism) or none (a plain one) is a copy on the others, if the values
    and first gradients are the same there, bit by bit; if not (experts of each rank's own), it is
    this rank's alone.
    """

    def __init__(self, group: Group = None, replicate_momentum: bool = False) -> None:
        super().__init__(group, replicate_momentum)
        self._mesh: DeviceMesh | None = None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._meter = Meter()

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Find the widest mesh, once.

        Raises:
            ValueError: the model has copies at the moment, of which POET's merge would be lost.
        """
        super().prepare(optimizer, routes, meter)
        self._meter = meter
        for route in routes:
            leaf = route.name.rpartition(".")[2]
            if route.layer is not None and not route.is_of(getattr(route.layer, leaf)):
                raise ValueError(
                    f"{route.name} is not the parameter that this optimizer has: either the model"
                    " was sharded after param_groups(model), or its last forward pass was followed"
                    " by no backward pass, so that FSDP2 has not resharded it; call"
                    " model.reshard() before optimizer.step()"
                )
        if self._mesh is None:
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            meshes = [p.device_mesh for p in tensors if isinstance(p, DTensor)]
            self._mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Raise for local tensors that are not contiguous, or whose sharding is not supported."""
        if self._mesh is None:
            super().check(routes, tensors)
            return
        for route, tensor in zip(routes, tensors, strict=True):
            check_contiguous(route, self.local(tensor))
            self._spread(route.name, tensor)

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return one for each way in which parameters lie."""
        if self._mesh is None:
            return super().locate(group, routes, tensors)
        spreads = [self._spread(r.name, t) for r, t in zip(routes, tensors, strict=True)]
        if self.replicas is not None:  # the user has said where the copies are
            spreads = [replace(spread, implied=()) for spread in spreads]
        same = self._same([route.name for route in routes], spreads, tensors)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, (tensor, spread) in enumerate(zip(tensors, spreads, strict=True)):
            mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
            dims = tuple(sorted({dim for dim, _ in spread.cuts}))
            copied = (*spread.copied, *spread.implied) if same[i] else spread.copied
            on = self._mesh if self._lifts(mesh) else mesh
            alike.setdefault((on, dims, tuple(sorted(copied))), []).append(i)
        located = []
        for (on, dims, copied), indices in alike.items():
            parameters = [(routes[i], tensors[i], spreads[i]) for i in indices]
            located.append(
                replace(self._place(on, dims, copied, parameters), tensors=tuple(indices))
            )
        return located

    @contextmanager
    def gathered(self, tensors: Sequence[Tensor], *, write: bool = False) -> Iterator[list[Tensor]]:
        """All-gather DTensors; each rank writes its own part back."""
        gathered = []
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                self._count(tensor)
            gathered.append(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        gathered = [full.detach() for full in gathered]
        yield gathered
        for tensor, full in zip(tensors if write else (), gathered, strict=write):
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                copies = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
                mine = copies.redistribute(mesh, tensor.placements).to_local()
                tensor.to_local().detach().copy_(mine)

    def _count(self, tensor: DTensor) -> None:
        """That its shards are sent to the other ranks, each dimension's after the one before."""
        mesh, numel = tensor.device_mesh, tensor.to_local().numel()
        for dim, _ in _cuts("a parameter", tensor)[::-1]:
            self._meter.count("all_gather", (mesh.size(dim) - 1) * numel * tensor.element_size())
            numel *= mesh.size(dim)

    def _place(
        self,
        mesh: DeviceMesh,
        dims: tuple[int, ...],
        copied: tuple[int, ...],
        parameters: Sequence[tuple[ParamSpec, Tensor, Spread]],
    ) -> Located:
        """Of parameters that the mesh dimensions ``dims`` cut and ``copied`` copy."""
        group = self._group(mesh, dims)
        rank = 0 if group is None else dist.get_rank(group)
        layouts, spans = [], []
        for i, (route, tensor, spread) in enumerate(parameters):
            local = self.local(tensor)
            spans.append((route.name, i, 0, local.numel()))
            if not route.matrices:
                continue
            boxes = _boxes(route, mesh, dims, spread.cuts)
            numel = math.prod(end - begin for begin, end in boxes[rank])
            if numel != local.numel():
                raise RuntimeError(
                    f"{route.name}: {getattr(tensor, 'placements', 'a plain tensor')} of"
                    f" {tuple(tensor.shape)} should be {numel} elements here, but there are"
                    f" {local.numel()}: its layout is not one that this release knows"
                )
            layouts += [grid_layout(m, route.stack, boxes, rank, i) for m in route.matrices]
        # a DTensor's momentum is one as well, for torch's own checkpoints: on every copy
        replicas, everywhere = self._group(mesh, copied), True
        outer = self.replicas
        if outer is not None and dist.get_world_size(outer) > 1:
            if replicas is not None:
                raise ValueError(
                    f"{parameters[0][0].name} is replicated by its mesh {mesh} and by process_group"
                    " (or DistributedDataParallel) as well; leave one of them out"
                )
            replicas, everywhere = outer, self.replicate_momentum
        device = self.local(parameters[0][1]).device
        return Located(tuple(layouts), group, device, tuple(spans), replicas, everywhere)

    def _lifts(self, mesh: DeviceMesh | None) -> bool:
        """Whether a parameter's mesh consists of named dimensions of the model's mesh."""
        whole = self._mesh
        if mesh is None or mesh == whole:
            return True
        assert whole is not None
        names, known = mesh.mesh_dim_names, whole.mesh_dim_names
        if names is None or known is None or not set(names) <= set(known):
            return False
        return bool(torch.equal(self._members(whole, [known.index(n) for n in names]), mesh.mesh))

    def _spread(self, name: str, tensor: Tensor) -> Spread:
        """How a parameter lies on the model's mesh, or on its own if that is another one."""
        whole = self._mesh
        assert whole is not None
        if not isinstance(tensor, DTensor):
            return Spread((), (), _wide(whole, range(whole.ndim)))
        mesh, cuts = tensor.device_mesh, _cuts(name, tensor)
        if mesh == whole or not self._lifts(mesh):
            rest = set(range(mesh.ndim)) - {dim for dim, _ in cuts}
            return Spread(cuts, _wide(mesh, rest), ())
        ours, theirs = whole.mesh_dim_names, mesh.mesh_dim_names
        assert ours is not None
        assert theirs is not None
        lift = [ours.index(dim_name) for dim_name in theirs]
        lifted = tuple((lift[dim], axis) for dim, axis in cuts)
        rest = set(lift) - {dim for dim, _ in lifted}
        implied = _wide(whole, set(range(whole.ndim)) - set(lift))
        return Spread(lifted, _wide(whole, rest), implied)

    def _same(
        self, names: Sequence[str], spreads: Sequence[Spread], tensors: Sequence[Tensor]
    ) -> list[bool]:
        """Whether each parameter is a copy along the dimensions that are implied; alike on all."""
        by_dims: dict[tuple[int, ...], list[int]] = {}
        for i, spread in enumerate(spreads):
            if spread.implied:
                by_dims.setdefault(spread.implied, []).append(i)
        if not by_dims:
            return [False] * len(tensors)
        assert self._mesh is not None
        differs = torch.zeros(2, len(tensors), device=self.local(tensors[0]).device)
        for dims, indices in by_dims.items():
            values = [_checksum(self.local(tensors[i])) for i in indices]
            # of each rank's own, but all zero at first: then their gradients tell
            grads = [_checksum(self.gradient(tensors[i])).to(values[0]) for i in indices]
            equal = all_equal(torch.stack(values + grads), self._group(self._mesh, dims))
            for k, i in enumerate(indices):
                unknown = tensors[i].grad is None and _is_constant(self.local(tensors[i]))
                differs[0, i] = not equal[k]
                differs[1, i] = unknown or not equal[k + len(indices)]
        everyone = _wide(self._mesh, range(self._mesh.ndim))
        sum_ranks(differs, self._group(self._mesh, everyone), Meter())
        value, gradient = (differs > 0).tolist()
        apart = [i for i, p in enumerate(tensors) if spreads[i].implied and p.grad is not None]
        apart = [i for i in apart if gradient[i] and not value[i]]
        if apart:
            warnings.warn(
                f"{', '.join(names[i] for i in apart[:5])}: equal on ranks of {self._mesh}, but not"
                " in their gradients, so each rank steps on its own; if they are copies, average"
                " their gradients",
                stacklevel=2,
            )
        return [not a and not b for a, b in zip(value, gradient, strict=True)]

    def _group(self, mesh: DeviceMesh, dims: Sequence[int]) -> Group:
        """The ranks that differ from this one along these dimensions only, in their mesh order."""
        if not dims:
            return None
        ranks = tuple(self._members(mesh, dims).flatten().tolist())
        if list(ranks) != sorted(ranks):
            raise ValueError(f"{mesh} does not number its ranks upwards, which is not supported")
        if len(dims) == 1:
            return mesh.get_group(dims[0])
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        if ranks not in self._groups:
            self._groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
        return self._groups[ranks]

    @staticmethod
    def _members(mesh: DeviceMesh, dims: Sequence[int]) -> Tensor:
        """The ranks that differ from this one along these dimensions only."""
        here = mesh.get_coordinate()
        assert here is not None
        chosen: Any = tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))
        ranks: Tensor = mesh.mesh[chosen]
        return ranks

    def world_groups(self) -> list[Group]:
        """Return the ranks of the model's mesh, and its replicas."""
        if self._mesh is None:
            return super().world_groups()
        whole = self._group(self._mesh, _wide(self._mesh, range(self._mesh.ndim)))
        return [whole, *super().world_groups()]

    def local(self, tensor: Tensor) -> Tensor:
        """A DTensor's local tensor."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """The gradient's local tensor, laid out as the parameter is (sums still pending, done)."""
        grad = tensor.grad
        if isinstance(grad, DTensor) and isinstance(tensor, DTensor):
            if grad.placements != tensor.placements:
                grad = grad.redistribute(placements=tensor.placements)
            return grad.to_local()
        return grad


def _wide(mesh: DeviceMesh, dims: Any) -> tuple[int, ...]:
    """Those of more than one rank."""
    return tuple(dim for dim in sorted(dims) if mesh.size(dim) > 1)


def _checksum(local: Tensor | None) -> Tensor:
    """A sum of its bits, weighted by position, int64: equal for equal values. None: -1."""
    if local is None:
        return torch.tensor(-1)
    flat = local.detach().reshape(-1)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in torch.split(
        flat.view(whole), 2**24
    ):  # eight bytes an element are needed for a moment
        weights = torch.arange(len(part), device=flat.device) * 2 + 1
        total = total * 31 + (part * weights).sum()
    return total


def _is_constant(local: Tensor) -> bool:
    """Whether all its elements, if it has any, are one value, as they may be before training."""
    flat = local.detach().reshape(-1)
    return len(flat) > 0 and bool((flat == flat[0]).all())


def _cuts(name: str, tensor: DTensor) -> tuple[tuple[int, int], ...]:
    """(mesh dimension, tensor dimension) of each cut, in the order in which they were made."""
    found: list[tuple[int, int, int]] = []
    for dim, placement in enumerate(tensor.placements):
        if tensor.device_mesh.size(dim) == 1 or placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if placement.is_partial() or axis is None:
            raise ValueError(
                f"{name} is {placement} on mesh dimension {dim}; shard or replicate it"
            )
        # FSDP over TP: a strided cut was made after those of the mesh dimensions to its right
        factor = int(getattr(placement, "split_factor", 0))
        strided = sum(1 for _, _, f in found if f)
        found.insert(len(found) - (0 if factor else strided), (dim, axis % tensor.ndim, factor))
    for i, (dim, axis, factor) in enumerate(found):
        before = math.prod(tensor.device_mesh.size(d) for d, a, _ in found[:i] if a == axis)
        if factor and factor != before:
            raise ValueError(
                f"{name}: {tensor.placements} on mesh dimension {dim} splits by {factor} where"
                f" {before} is expected; this order of shardings is not supported"
            )
    return tuple((dim, axis) for dim, axis, _ in found)


def _boxes(
    route: ParamSpec,
    mesh: DeviceMesh,
    dims: tuple[int, ...],
    cuts: tuple[tuple[int, int], ...],
) -> StackBoxes:
    """What each rank along ``dims`` stores, in the order of their coordinates."""
    shape = route.shape
    if not route.stacked and any(axis > 1 for _, axis in cuts):
        raise ValueError(
            f"{route.name}, {shape}, is cut beyond its second dimension; cut its first"
        )
    sizes = tuple((dim, mesh.size(dim)) for dim in dims)
    return _boxes_of(tuple(shape), route.stacked, sizes, cuts)


@lru_cache(maxsize=1024)
def _boxes_of(
    shape: tuple[int, ...],
    stacked: bool,
    sizes: tuple[tuple[int, int], ...],
    cuts: tuple[tuple[int, int], ...],
) -> StackBoxes:
    """``_boxes`` of all parameters of one shape that are cut alike; ``sizes``: (dim, ranks)."""
    boxes, ranks_along = [], dict(sizes)
    for place in product(*(range(size) for _, size in sizes)):
        at = dict(zip(ranks_along, place, strict=True))
        ranges = [(0, size) for size in shape]
        for dim, axis in cuts:
            begin, end = ranges[axis]
            chunk = -(-(end - begin) // ranks_along[dim])  # as torch.chunk cuts
            first = min(end, begin + at[dim] * chunk)
            ranges[axis] = first, min(end, first + chunk)
        boxes.append(_as_stack(ranges, stacked, math.prod(shape[2:])))
    return StackBoxes(boxes)


def _as_stack(ranges: list[tuple[int, int]], stacked: bool, rest: int) -> StackBox:
    """A box of the parameter seen as (stack, rows, columns); ``rest``: of a convolution."""
    if stacked:
        return ranges[0], ranges[1], ranges[2]
    return (0, 1), ranges[0], (ranges[1][0] * rest, ranges[1][1] * rest)
