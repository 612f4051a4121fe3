"""Less gradient traffic under DistributedDataParallel: SUMO's gradients are reduced projected.

Projecting is linear, and the basis Q is the same on all replicas: the average of Q^T G over ranks,
r x n numbers, is Q^T of the average (arXiv 2505.24749). So between two refreshes of a matrix Q^T G
is all SUMO needs of it, if it adds nothing from outside of the subspace (perp_scale 0).
"""

# no postponed annotations: torch compares those of a hook with its own types

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.units import MatrixUnit
from spectral_dist.params.spec import ParamSpec
from spectral_dist.rules.sumo import SUMOOptions, rank_of, refreshes
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.layout import Matrix

GradBucket: TypeAlias = dist.GradBucket  # type: ignore[attr-defined,name-defined]


def project_gradients(model: DistributedDataParallel, optimizer: SpectralOptimizer) -> "Projection":
    """Have ``model`` reduce the projection of each matrix's gradient where that is enough.

    Call it on every rank, before training or after a checkpoint was loaded. What ``step`` sees is
    Q Q^T G in place of G, so gradient norms and clipping are those of the projection. Every rank
    keeps a copy of every basis: m r numbers a matrix.

    Raises:
        ValueError: perp_scale or refresh_below is not 0 (both need the whole gradient), or the
            optimizer is not that of this model.
    """
    return Projection(model, optimizer)


@dataclass
class Projected:
    """A matrix of a parameter, and what this rank knows of its state at its owner."""

    matrix: Matrix
    owner: int
    """rank in the model's process group"""
    options: SUMOOptions
    is_double: bool
    step: int = 0
    basis: Tensor | None = None
    """(long, r): the owner's own, or a copy of it"""

    @property
    def due(self) -> bool:
        """Whether the coming step needs the whole gradient."""
        whole = rank_of(self.options, self.matrix.shape) == min(self.matrix.shape)
        return whole or self.basis is None or refreshes(self.options, self.matrix.name, self.step)

    def rows(self, gradient: Tensor) -> list[Tensor]:
        """Views of its blocks of rows in its parameter's gradient."""
        width = self.matrix.shape[1]
        flat = gradient.reshape(-1, width)
        return [flat[first // width :][:count] for first, count in self.matrix.blocks]


class Projection:
    """The communication hook of one model, and what it has sent: see ``project_gradients``.

    ``meter``: calls and bytes of the hook itself, as a ring sends them for each element once.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: SpectralOptimizer) -> None:
        self.group: dist.ProcessGroup = model.process_group
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
        self.known = self._known(model)
        self._by_parameter: dict[int, list[Projected]] = {}
        for route, projected in self.known:
            self._by_parameter.setdefault(id(route.parameter), []).append(projected)
        self.synchronize()
        optimizer.after_load.append(self.synchronize)
        optimizer.register_step_post_hook(self._after_step)
        model.register_comm_hook(self, Projection.reduce)

    def _known(self, model: DistributedDataParallel) -> list[tuple[ParamSpec, Projected]]:
        """Every matrix, with its owner."""
        mine = {id(p) for p in model.parameters()}
        found = []
        self.optimizer.initialize_state()
        for group in self.optimizer.param_groups:
            if group["kind"] != "matrix":
                continue
            owners: dict[str, int] = {}
            options: Any = self.optimizer.rule_options(group)
            is_double = group["params"][0].dtype == torch.float64
            for unit in self.optimizer.units(group):
                if unit.located.group is not None or unit.located.replicas != self.group:
                    raise ValueError(
                        "project_gradients is for parameters that every rank of the"
                        " DistributedDataParallel holds whole, and an optimizer built of"
                        " spectral_dist.param_groups(that model)"
                    )
                assert isinstance(unit, MatrixUnit)
                owners |= dict(zip(unit.names, unit.plan.owners, strict=True))
            for route in self.optimizer.routes[group["id"]]:
                if id(route.parameter) not in mine:
                    raise ValueError(f"project_gradients: {route.name} is not of this model")
                if not route.parameter.is_contiguous():
                    raise ValueError(
                        f"project_gradients: {route.name} is channels_last; leave the model"
                        " contiguous, or leave project_gradients out"
                    )
                for matrix in route.matrices:
                    if matrix.transposed:
                        raise ValueError(
                            f"project_gradients: {matrix.name} is stored in x out, which is not"
                            " supported; leave project_gradients out"
                        )
                    found.append(
                        (route, Projected(matrix, owners[matrix.name], options, is_double))
                    )
        return found

    def synchronize(self) -> None:
        """Take every basis from its owner. A collective call; nothing to be taken before a step."""
        self._share([projected for _, projected in self.known])

    def _share(self, some: list[Projected]) -> None:
        """Bring steps and bases of these matrices from their owners: one broadcast each owner."""
        state, rank = self.optimizer.matrix_state(), collectives.rank(self.group)
        by_owner: dict[int, list[Projected]] = {}
        for projected in some:
            by_owner.setdefault(projected.owner, []).append(projected)
        for owner, found in sorted(by_owner.items()):
            shapes = [self._shape(projected) for projected in found]
            sizes = [1 + m * r for m, r in shapes]
            like = self.optimizer.device
            wide = torch.float64 if any(p.is_double for p in found) else torch.float32
            flat = torch.empty(sum(sizes), dtype=wide, device=like)
            parts = torch.split(flat, sizes)
            if owner == rank:
                for part, projected in zip(parts, found, strict=True):
                    kept = state[projected.matrix.name]
                    part[0] = kept["step"]
                    if "basis" in kept:
                        part[1:] = kept["basis"].reshape(-1)
            self.meter.count("broadcast", flat.numel() * flat.element_size() * (owner == rank))
            dist.broadcast(flat, dist.get_global_rank(self.group, owner), group=self.group)
            steps = torch.stack([part[0] for part in parts]).tolist()
            for projected, part, shape, step in zip(found, parts, shapes, steps, strict=True):
                projected.step = int(step)
                own = state.get(projected.matrix.name, {}).get("basis")
                if step and shape[1]:
                    projected.basis = part[1:].view(shape).clone() if own is None else own

    def _shape(self, projected: Projected) -> tuple[int, int]:
        """Of its basis; no columns where there is none."""
        short, long = sorted(projected.matrix.shape)
        r = rank_of(projected.options, projected.matrix.shape)
        return long, 0 if r == short else r

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Count steps as owners do, and take the new bases."""
        due = []
        for route, projected in self.known:
            if route.parameter.grad is None:
                continue
            if projected.due:
                due.append(projected)
            else:
                projected.step += 1
        if due:
            self._share(due)

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The hook: a bucket's average gradient over ranks, projected where that is enough."""
        ranks = collectives.size(self.group)
        parts = list(self._parts(bucket))
        small = [part if q is None else _project(part, q) for part, q in parts]
        sizes = [x.numel() for x in small]
        flat = torch.cat([x.reshape(-1) for x in small]).div_(ranks)
        self.meter.count("all_reduce", flat.numel() * flat.element_size())
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None

        def spread(future: torch.futures.Future[Any]) -> Tensor:
            reduced = future.value()
            found = torch.split(reduced[0] if isinstance(reduced, list) else reduced, sizes)
            for (part, q), value, shape in zip(parts, found, [x.shape for x in small], strict=True):
                part.copy_(value.view(shape) if q is None else _lift(value.view(shape), q, part))
            for gradient, projected, whole in joined:
                torch._foreach_copy_(
                    projected.rows(gradient),
                    list(torch.split(whole, [count for _, count in projected.matrix.blocks])),
                )
            result: Tensor = bucket.buffer()
            return result

        joined = self._joined
        future: torch.futures.Future[Tensor] = work.get_future().then(spread)
        return future

    def _parts(self, bucket: GradBucket) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(gradient, its basis or None if it is reduced whole) of all that is in a bucket.

        Of a matrix in several blocks of rows a copy, which ``_joined`` tells where to put back.
        """
        self._joined: list[tuple[Tensor, Projected, Tensor]] = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            found = self._by_parameter.get(id(parameter), [])
            if not found or any(projected.due for projected in found):
                yield gradient, None
                continue
            for projected in found:
                rows = projected.rows(gradient)
                part = rows[0] if len(rows) == 1 else torch.cat(rows)
                if len(rows) > 1:
                    self._joined.append((gradient, projected, part))
                yield part, projected.basis


def _project(g: Tensor, q: Tensor) -> Tensor:
    """Q^T G of the long side, in the gradient's dtype."""
    tall = g if g.shape[0] >= g.shape[1] else g.mT
    return (q.mT @ tall.to(q.dtype)).to(g.dtype)


def _lift(c: Tensor, q: Tensor, like: Tensor) -> Tensor:
    """Q C, lying as the gradient."""
    g = q @ c.to(q.dtype)
    return g if like.shape[0] >= like.shape[1] else g.mT
