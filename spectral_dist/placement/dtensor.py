"""Where DTensor parameters live: FSDP2, HSDP, tensor parallelism and any of them together.

Everything is read off the parameters. Ranks along a mesh dimension that shards a parameter share
its matrices; ranks along one that replicates it hold copies, of which one does the work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement, check_contiguous
from spectral_dist.placement.mesh_sharding import (
    MeshSharding,
    nontrivial,
    sharded_dims,
    stored_stack_boxes,
)
from spectral_dist.sharding.collectives import Group, Meter, all_equal, sum_ranks
from spectral_dist.sharding.layout import Located, grid_layout


class MeshPlacement(ReplicatedPlacement):
    """DTensor parameters, sharded as their mesh says; plain ones are whole on every rank.

    The model's mesh is the widest that any parameter has. A parameter whose mesh has only some of
    its dimensions (FSDP beside tensor parallelism) or none (a plain parameter) is taken to be
    replicated along the others if its values and first gradients are equal there, bit by bit; if
    they are not (as of experts that differ between ranks), it belongs to this rank only.

    Args:
        group, replicate_momentum: as in ``ReplicatedPlacement``.
    """

    def __init__(self, group: Group = None, replicate_momentum: bool = False) -> None:
        super().__init__(group, replicate_momentum)
        self._mesh: DeviceMesh | None = None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._meter = Meter()

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Find the widest mesh, in the first call.

        Raises:
            ValueError: the model has gathered copies of parameters at the moment, so that what
                POET merges into them would be lost.
        """
        super().prepare(optimizer, routes, meter)
        self._meter = meter
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        for route, tensor in zip(routes, tensors, strict=False):
            leaf = route.name.rpartition(".")[2]
            if route.layer is not None and tensor is not getattr(route.layer, leaf):
                raise ValueError(
                    f"{route.name} is not the parameter that this optimizer has: either the model"
                    " was sharded after param_groups(model), or its last forward pass was followed"
                    " by no backward pass, so that FSDP2 has not resharded it; call"
                    " model.reshard() before optimizer.step()"
                )
        if self._mesh is None:
            meshes = [p.device_mesh for p in tensors if isinstance(p, DTensor)]
            self._mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Raise for local tensors that are not contiguous, or whose sharding is not supported."""
        if self._mesh is None:
            super().check(routes, tensors)
            return
        for route, tensor in zip(routes, tensors, strict=True):
            check_contiguous(route, self.local(tensor))
            self._sharding(route.name, tensor)

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return where parameters live, one ``Located`` for all that are sharded alike.

        Raises:
            ValueError: a sharding that is not supported.
            RuntimeError: a local tensor of another size than its placements say.
        """
        if self._mesh is None:
            return super().locate(group, routes, tensors)
        shardings = [self._sharding(r.name, t) for r, t in zip(routes, tensors, strict=True)]
        if self.replicas is not None:  # the user has said which ranks hold copies
            shardings = [replace(sharding, unmentioned=()) for sharding in shardings]
        has_copies = self._find_replicated([route.name for route in routes], shardings, tensors)
        by_placement: dict[tuple[Any, ...], list[int]] = {}
        for i, (tensor, sharding) in enumerate(zip(tensors, shardings, strict=True)):
            own_mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
            mesh = self._mesh if self._is_submesh(own_mesh) else own_mesh
            dims = tuple(sorted({dim for dim, _ in sharding.sharded}))
            replicated = sharding.replicated + (sharding.unmentioned if has_copies[i] else ())
            by_placement.setdefault((mesh, dims, tuple(sorted(replicated))), []).append(i)
        located = []
        for (mesh, dims, replicated), indices in by_placement.items():
            parameters = [(routes[i], tensors[i], shardings[i]) for i in indices]
            located.append(
                replace(self._place(mesh, dims, replicated, parameters), tensors=tuple(indices))
            )
        return located

    @contextmanager
    def gathered(self, tensors: Sequence[Tensor], *, write: bool = False) -> Iterator[list[Tensor]]:
        """All-gather DTensors and yield whole tensors; with ``write`` ranks write shards back."""
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
                shard = copies.redistribute(mesh, tensor.placements).to_local()
                tensor.to_local().detach().copy_(shard)

    def _count(self, tensor: DTensor) -> None:
        """Count the bytes of gathering a DTensor, one mesh dimension after the other."""
        mesh, numel = tensor.device_mesh, tensor.to_local().numel()
        for dim, _ in sharded_dims("a parameter", tensor)[::-1]:
            self._meter.count("all_gather", (mesh.size(dim) - 1) * numel * tensor.element_size())
            numel *= mesh.size(dim)

    def _place(
        self,
        mesh: DeviceMesh,
        dims: tuple[int, ...],
        replicated: tuple[int, ...],
        parameters: Sequence[tuple[ParamSpec, Tensor, MeshSharding]],
    ) -> Located:
        """Return where parameters live that are sharded alike.

        Args:
            mesh: of all of them.
            dims: the mesh dimensions that shard them.
            replicated: the mesh dimensions that replicate them.
            parameters: each with its spec and sharding.

        Raises:
            ValueError: both the mesh and the user's process group replicate them.
            RuntimeError: a local tensor of another size than its placements say.
        """
        group = self._group(mesh, dims)
        rank = 0 if group is None else dist.get_rank(group)
        sizes = tuple((dim, mesh.size(dim)) for dim in dims)
        layouts, spans = [], []
        for i, (route, tensor, sharding) in enumerate(parameters):
            local = self.local(tensor)
            spans.append((route.name, i, 0, local.numel()))
            if not route.matrices:
                continue
            boxes = stored_stack_boxes(route, sizes, sharding.sharded)
            numel = math.prod(end - begin for begin, end in boxes[rank])
            if numel != local.numel():
                raise RuntimeError(
                    f"{route.name}: {getattr(tensor, 'placements', 'a plain tensor')} of"
                    f" {tuple(tensor.shape)} should be {numel} elements here, but there are"
                    f" {local.numel()}: its layout is not one that this release knows"
                )
            layouts += [grid_layout(m, route.stack, boxes, rank, i) for m in route.matrices]
        # momentum of a DTensor is a DTensor, for torch's own checkpoints, so every copy stores it
        replicas, replicate_momentum = self._group(mesh, replicated), True
        outer = self.replicas
        if outer is not None and dist.get_world_size(outer) > 1:
            if replicas is not None:
                raise ValueError(
                    f"{parameters[0][0].name} is replicated by its mesh {mesh} and by process_group"
                    " (or DistributedDataParallel) as well; leave one of them out"
                )
            replicas, replicate_momentum = outer, self.replicate_momentum
        device = self.local(parameters[0][1]).device
        return Located(tuple(layouts), group, device, tuple(spans), replicas, replicate_momentum)

    def _is_submesh(self, mesh: DeviceMesh | None) -> bool:
        """Return whether a parameter's mesh consists of named dimensions of the model's mesh."""
        model_mesh = self._mesh
        if mesh is None or mesh == model_mesh:
            return True
        assert model_mesh is not None
        names, model_names = mesh.mesh_dim_names, model_mesh.mesh_dim_names
        if names is None or model_names is None or not set(names) <= set(model_names):
            return False
        ranks = self._members(model_mesh, [model_names.index(name) for name in names])
        return bool(torch.equal(ranks, mesh.mesh))

    def _sharding(self, name: str, tensor: Tensor) -> MeshSharding:
        """Return how a parameter is sharded on the model's mesh.

        If the parameter's mesh is no part of the model's, dimensions are those of its own mesh.
        """
        model_mesh = self._mesh
        assert model_mesh is not None
        if not isinstance(tensor, DTensor):
            return MeshSharding((), (), nontrivial(model_mesh, range(model_mesh.ndim)))
        mesh, sharded = tensor.device_mesh, sharded_dims(name, tensor)
        if mesh == model_mesh or not self._is_submesh(mesh):
            rest = set(range(mesh.ndim)) - {dim for dim, _ in sharded}
            return MeshSharding(sharded, nontrivial(mesh, rest), ())
        model_names, names = model_mesh.mesh_dim_names, mesh.mesh_dim_names
        assert model_names is not None
        assert names is not None
        model_dims = [model_names.index(dim_name) for dim_name in names]
        sharded = tuple((model_dims[dim], axis) for dim, axis in sharded)
        rest = set(model_dims) - {dim for dim, _ in sharded}
        unmentioned = nontrivial(model_mesh, set(range(model_mesh.ndim)) - set(model_dims))
        return MeshSharding(sharded, nontrivial(model_mesh, rest), unmentioned)

    def _find_replicated(
        self, names: Sequence[str], shardings: Sequence[MeshSharding], tensors: Sequence[Tensor]
    ) -> list[bool]:
        """Return whether each parameter has copies along its unmentioned mesh dimensions.

        A collective call of the model's mesh: values and gradients are compared there, and every
        rank gets the same answer. Warns of a parameter whose values are equal but whose gradients
        are not.

        Args:
            names: of the parameters.
            shardings: of the parameters.
            tensors: the parameters.
        """
        by_dims: dict[tuple[int, ...], list[int]] = {}
        for i, sharding in enumerate(shardings):
            if sharding.unmentioned:
                by_dims.setdefault(sharding.unmentioned, []).append(i)
        if not by_dims:
            return [False] * len(tensors)
        assert self._mesh is not None
        differs = torch.zeros(2, len(tensors), device=self.local(tensors[0]).device)
        for dims, indices in by_dims.items():
            values = [_checksum(self.local(tensors[i])) for i in indices]
            # parameters that differ between ranks may all be zero at first: then gradients tell
            grads = [_checksum(self.gradient(tensors[i])).to(values[0]) for i in indices]
            equal = all_equal(torch.stack(values + grads), self._group(self._mesh, dims))
            for k, i in enumerate(indices):
                unknown = tensors[i].grad is None and _is_constant(self.local(tensors[i]))
                differs[0, i] = not equal[k]
                differs[1, i] = unknown or not equal[k + len(indices)]
        all_dims = nontrivial(self._mesh, range(self._mesh.ndim))
        sum_ranks(differs, self._group(self._mesh, all_dims), Meter())
        values_differ, gradients_differ = (differs > 0).tolist()
        suspicious = [
            i
            for i, p in enumerate(tensors)
            if shardings[i].unmentioned
            and p.grad is not None
            and gradients_differ[i]
            and not values_differ[i]
        ]
        if suspicious:
            shown = ", ".join(names[i] for i in suspicious[:5])
            warnings.warn(
                f"{shown}: equal on ranks of {self._mesh}, but not"
                " in their gradients, so each rank steps on its own; if they are copies, average"
                " their gradients",
                stacklevel=2,
            )
        return [not a and not b for a, b in zip(values_differ, gradients_differ, strict=True)]

    def _group(self, mesh: DeviceMesh, dims: Sequence[int]) -> Group:
        """Return the group of ranks that differ from this one along some mesh dimensions only.

        Ranks are in the order of the mesh. Groups are made once.

        Raises:
            ValueError: the mesh does not number its ranks upwards.
        """
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
        """Return the ranks that differ from this one along some mesh dimensions only.

        The tensor has those dimensions, in the order of the mesh.
        """
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        index: Any = tuple(slice(None) if d in dims else coordinate[d] for d in range(mesh.ndim))
        ranks: Tensor = mesh.mesh[index]
        return ranks

    def world_groups(self) -> list[Group]:
        """Return the group of the model's mesh, and that of its replicas."""
        if self._mesh is None:
            return super().world_groups()
        all_dims = nontrivial(self._mesh, range(self._mesh.ndim))
        return [self._group(self._mesh, all_dims), *super().world_groups()]

    def local(self, tensor: Tensor) -> Tensor:
        """Return a DTensor's local tensor, and a plain tensor itself."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """Return the gradient's local tensor, redistributed to the parameter's placements.

        Sums over ranks that are still pending in the gradient are carried out by that.
        """
        grad = tensor.grad
        if isinstance(grad, DTensor) and isinstance(tensor, DTensor):
            if grad.placements != tensor.placements:
                grad = grad.redistribute(placements=tensor.placements)
            return grad.to_local()
        return grad


def _checksum(local: Tensor | None) -> Tensor:
    """Return a sum of a tensor's bits, weighted by position, int64: equal for equal values.

    It is -1 for None.
    """
    if local is None:
        return torch.tensor(-1)
    flat = local.detach().reshape(-1)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # in parts, because eight bytes an element are needed for a moment
    for part in torch.split(flat.view(integer), 2**24):
        weights = torch.arange(len(part), device=flat.device) * 2 + 1
        total = total * 31 + (part * weights).sum()
    return total


def _is_constant(local: Tensor) -> bool:
    """Return whether a tensor has elements that are all equal, as they may be before training."""
    flat = local.detach().reshape(-1)
    return len(flat) > 0 and bool((flat == flat[0]).all())
