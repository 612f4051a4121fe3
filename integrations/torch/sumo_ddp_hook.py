"""Less gradient traffic under DistributedDataParallel: the hook reduces SUMO's projected gradients.

Projection is linear, and the basis Q is the same on all replicas: the average over ranks of Q^T G,
r x n numbers, is Q^T times the average of G (arXiv 2505.24749). So between two is_refresh_step of a
matrix's basis SUMO needs no more of its gradient than Q^T G, provided that it adds nothing from
outside of the subspace (perp_scale 0).
"""

# No `from __future__ import annotations`: torch compares a hook's annotations with its own types.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from spectral_dist._error_help import explained
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.integrations.torch.ddp_hooks import replicated_units, set_hook
from spectral_dist.params.spec import ParamSpec
from spectral_dist.rules.sumo import SUMOOptions, is_refresh_step, rank_of
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.matrix import Matrix

GradBucket: TypeAlias = dist.GradBucket  # type: ignore[attr-defined,name-defined]


@explained
def project_gradients(model: DistributedDataParallel, optimizer: SpectralOptimizer) -> "Projection":
    """Make ``model`` reduce the projection of each matrix's gradient where SUMO needs no more.

    Call it on every rank, before training or after a checkpoint was loaded. The optimizer's
    ``step`` then finds Q Q^T G in place of G, so gradient norms and clipping are those of the
    projection. Every rank keeps a copy of every basis: m r numbers a matrix.

    Args:
        model: whose communication hook is set.
        optimizer: a ``spectral_dist.SUMO`` of the model's parameters.

    Returns:
        The hook, whose ``meter`` counts what it sends.

    Raises:
        ValueError: perp_scale or refresh_below is not 0 (both need the whole gradient), or the
            optimizer is not that of this model.
    """
    return Projection(model, optimizer)


@dataclass
class ProjectedMatrix:
    """A matrix of a parameter, and this rank's copy of its state at the owner.

    Attributes:
        matrix: the matrix.
        owner: its owner's rank in the model's process group.
        options: SUMO's, of its parameter group.
        is_double: whether the parameter is float64.
        step: steps taken on the matrix.
        basis: Q, (max(m, n), r): the owner's own tensor, or a copy of it. None before the first
            step, or if r is min(m, n), so that there is no projection.
    """

    matrix: Matrix
    owner: int
    options: SUMOOptions
    is_double: bool
    step: int = 0
    basis: Tensor | None = None

    @property
    def needs_whole_gradient(self) -> bool:
        """Return whether the coming step needs the whole gradient, for example to refresh Q."""
        is_full_rank = rank_of(self.options, self.matrix.shape) == min(self.matrix.shape)
        if is_full_rank or self.basis is None:
            return True
        return is_refresh_step(self.options, self.matrix.name, self.step)

    def rows(self, gradient: Tensor) -> list[Tensor]:
        """Return views of the matrix's blocks of rows in its parameter's gradient."""
        width = self.matrix.shape[1]
        flat = gradient.reshape(-1, width)
        return [flat[first // width :][:count] for first, count in self.matrix.blocks]


class Projection:
    """The communication hook of one model; see ``project_gradients``.

    Attributes:
        group: the model's process group.
        matrices: each matrix of the model, with the route of its parameter.
        meter: calls of the hook's own collectives, and their bytes as a ring would send them,
            each element counted once.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: SpectralOptimizer) -> None:
        if not isinstance(optimizer.options, SUMOOptions):
            raise ValueError(
                "project_gradients is for spectral_dist.SUMO, and this is"
                f" {type(optimizer).__name__}"
            )
        self.optimizer, self.meter = optimizer, Meter()
        for group in optimizer.param_groups:
            for name in ("perp_scale", "refresh_below"):
                if group.get(name):
                    raise ValueError(
                        f"project_gradients: {name} is {group[name]}, which needs the whole"
                        f" gradient in every step; write {name}=0"
                    )
        self.matrices = self._find_matrices(model)
        self.group: dist.ProcessGroup = model.process_group
        self._by_parameter: dict[int, list[ProjectedMatrix]] = {}
        for route, projected in self.matrices:
            self._by_parameter.setdefault(id(route.parameter), []).append(projected)
        self.synchronize()
        optimizer.after_load.append(self.synchronize)
        optimizer.register_step_post_hook(self._after_step)
        set_hook(model, self, Projection.reduce, "project_gradients")

    def _find_matrices(
        self, model: DistributedDataParallel
    ) -> list[tuple[ParamSpec, ProjectedMatrix]]:
        """Return each matrix of the optimizer, with the route of its parameter.

        Raises:
            ValueError: a parameter that is not supported, or is not the model's.
        """
        matrices = []
        for group, units in replicated_units(model, self.optimizer, "project_gradients"):
            options: Any = self.optimizer.rule_options(group)
            is_double = group["params"][0].dtype == torch.float64
            owners = {
                name: owner
                for unit in units
                for name, owner in zip(unit.names, unit.plan.owners, strict=True)
            }
            for route in self.optimizer.routes[group["id"]]:
                for matrix in route.matrices:
                    if matrix.transposed:
                        raise ValueError(
                            f"project_gradients: {matrix.name} is stored in x out, which is not"
                            " supported; leave project_gradients out"
                        )
                    owner = owners[matrix.name]
                    matrices.append((route, ProjectedMatrix(matrix, owner, options, is_double)))
        return matrices

    def synchronize(self) -> None:
        """Copy every basis from its owner, if there has been a step. A collective call."""
        self._broadcast_states([projected for _, projected in self.matrices])

    def _broadcast_states(self, matrices: list[ProjectedMatrix]) -> None:
        """Copy steps and bases of these matrices from their owners, in one broadcast an owner."""
        state, rank = self.optimizer.matrix_state(), collectives.rank(self.group)
        by_owner: dict[int, list[ProjectedMatrix]] = {}
        for projected in matrices:
            by_owner.setdefault(projected.owner, []).append(projected)
        for owner, owned in sorted(by_owner.items()):
            shapes = [self._basis_shape(projected) for projected in owned]
            sizes = [1 + m * r for m, r in shapes]
            dtype = torch.float64 if any(p.is_double for p in owned) else torch.float32
            flat = torch.empty(sum(sizes), dtype=dtype, device=self.optimizer.device)
            parts = torch.split(flat, sizes)
            if owner == rank:
                for part, projected in zip(parts, owned, strict=True):
                    quantities = state[projected.matrix.name]
                    part[0] = quantities["step"]
                    if "basis" in quantities:
                        part[1:] = quantities["basis"].reshape(-1)
            self.meter.count("broadcast", flat.numel() * flat.element_size() * (owner == rank))
            dist.broadcast(flat, dist.get_global_rank(self.group, owner), group=self.group)
            steps = torch.stack([part[0] for part in parts]).tolist()
            for projected, part, shape, step in zip(owned, parts, shapes, steps, strict=True):
                projected.step = int(step)
                basis = state.get(projected.matrix.name, {}).get("basis")
                if step and shape[1]:
                    projected.basis = part[1:].view(shape).clone() if basis is None else basis

    def _basis_shape(self, projected: ProjectedMatrix) -> tuple[int, int]:
        """Return the shape of a matrix's basis, with no columns if it has none."""
        short, long = sorted(projected.matrix.shape)
        r = rank_of(projected.options, projected.matrix.shape)
        return long, 0 if r == short else r

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Count each matrix's steps as its owner does, and copy the bases that are new."""
        refreshed = []
        for route, projected in self.matrices:
            if route.parameter.grad is None:
                continue
            if projected.needs_whole_gradient:
                refreshed.append(projected)
            else:
                projected.step += 1
        if refreshed:
            self._broadcast_states(refreshed)

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average a bucket's gradients over ranks, projected where that is enough; DDP's hook.

        Returns:
            A future of the bucket's buffer, in which the averages then are.
        """
        num_ranks = collectives.size(self.group)
        parts = list(self._parts(bucket))
        projections = [part if q is None else _project(part, q) for part, q in parts]
        sizes = [projection.numel() for projection in projections]
        flat = torch.cat([projection.reshape(-1) for projection in projections]).div_(num_ranks)
        self.meter.count("all_reduce", flat.numel() * flat.element_size())
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None

        def write_back(future: torch.futures.Future[Any]) -> Tensor:
            reduced = future.value()
            averages = torch.split(reduced[0] if isinstance(reduced, list) else reduced, sizes)
            shapes = [projection.shape for projection in projections]
            for (part, q), average, shape in zip(parts, averages, shapes, strict=True):
                average = average.view(shape)
                part.copy_(average if q is None else _unproject(average, q, part))
            for gradient, projected, part in joined_parts:
                counts = [count for _, count in projected.matrix.blocks]
                torch._foreach_copy_(projected.rows(gradient), list(torch.split(part, counts)))
            result: Tensor = bucket.buffer()
            return result

        joined_parts = self._joined_parts
        future: torch.futures.Future[Tensor] = work.get_future().then(write_back)
        return future

    def _parts(self, bucket: GradBucket) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (gradient, basis) of each matrix in a bucket, and (gradient, None) of the rest.

        Gradients without a basis are reduced whole. If a matrix lies in several blocks of rows, its
        gradient is a copy, and ``_joined_parts`` holds what is needed to write it back.
        """
        self._joined_parts: list[tuple[Tensor, ProjectedMatrix, Tensor]] = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            matrices = self._by_parameter.get(id(parameter), [])
            if not matrices or any(projected.needs_whole_gradient for projected in matrices):
                yield gradient, None
                continue
            for projected in matrices:
                rows = projected.rows(gradient)
                part = rows[0] if len(rows) == 1 else torch.cat(rows)
                if len(rows) > 1:
                    self._joined_parts.append((gradient, projected, part))
                yield part, projected.basis


def _project(g: Tensor, q: Tensor) -> Tensor:
    """Return Q^T G, (r, short), in the gradient's dtype; of G^T if G has more columns than rows."""
    tall = g if g.shape[0] >= g.shape[1] else g.mT
    return (q.mT @ tall.to(q.dtype)).to(g.dtype)


def _unproject(c: Tensor, q: Tensor, like: Tensor) -> Tensor:
    """Return Q C in the orientation of ``like``, the gradient whose projection C is."""
    g = q @ c.to(q.dtype)
    return g if like.shape[0] >= like.shape[1] else g.mT
