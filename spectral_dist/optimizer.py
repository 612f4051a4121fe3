"""The one step() loop: rules on whole matrices, AdamW on the rest, wherever they live."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_dist import groups as routing
from spectral_dist import matrix_state, strategy
from spectral_dist.group_options import group_options
from spectral_dist.groups import Route
from spectral_dist.handles import Handle
from spectral_dist.matrix_state import MatrixState, Part, elements
from spectral_dist.matrix_step import MatrixStep, Unit
from spectral_dist.monitor import Monitor
from spectral_dist.options import BaseOptions, Options
from spectral_dist.placement import Placer, WholeParameters
from spectral_dist.polar import DTYPES, resolve_dtype
from spectral_dist.rules import adamw
from spectral_dist.rules.rule import Rule
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.layout import Placement
from spectral_dist.sharding.plan import make_plan


class SpectralOptimizer(torch.optim.Optimizer):
    """A rule for matrices and AdamW for the rest, with the same numbers under every layout.

    Args:
        params: ``spectral_dist.param_groups(model)``; or parameters, or groups of them, that
            ``spectral_dist.tag(model)`` has tagged.
        lr: learning rate of the matrices, and of the rest unless ``scalar_lr`` is given.
        process_group: the ranks that hold replicas of plain parameters; each matrix is then
            orthogonalized on one of them. None: those of the DistributedDataParallel that
            ``param_groups`` was given, or this process alone.
        options: see ``spectral_dist.options`` for names and defaults.

    Attributes:
        polar_calls: matrices this rank has orthogonalized.
        observers: called with the names and values (k, m, n) of all that is orthogonalized here.
        monitor: see ``spectral_dist.monitor``.
        after_load: called on every rank when a checkpoint has been loaded.
        meter: calls and bytes of this rank's exchanges; ``comm_bytes`` is their sum.

    Raises:
        ValueError: unknown or bad options, frozen or untagged parameters.
    """

    rule: Rule
    option_type: ClassVar[type[BaseOptions]]
    options: Any
    placer_type: ClassVar[Callable[[Group, bool], Placer]] = WholeParameters

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = Options.lr,
        *,
        process_group: Group = None,
        **options: Any,
    ) -> None:
        self.options = self.option_type.from_user({"lr": lr, **options}, type(self).__name__)
        everywhere = getattr(self.options, "replicate_momentum", False)
        self.placer: Placer = type(self).placer_type(process_group, everywhere)
        self.meter = Meter()
        self.polar_calls = 0
        self.routes: list[list[Route]] = []
        self._units: dict[object, list[Unit]] = {}
        self._warned: set[str] = set()
        self.observers: list[Callable[[Sequence[str], Tensor], None]] = []
        self.monitor: Monitor | None = None
        self.after_load: list[Callable[[], None]] = []
        self._scalar_update = adamw.BACKENDS[self.options.scalar_backend]()
        super().__init__(routing.grouped(params), {"lr": self.options.lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; a group of both kinds becomes two."""
        for group in routing.grouped([param_group]):
            options = self.complete(group_options(group, self.options), group["routes"])
            options["id"] = len(self.routes)
            self.routes.append(group["routes"])
            super().add_param_group({**options, "params": group["params"]})

    def complete(self, options: dict[str, Any], routes: Sequence[Route]) -> dict[str, Any]:
        """Options of a group that depend on its matrices."""
        return options

    @property
    def comm_bytes(self) -> int:
        """Bytes that this rank has sent to others in this optimizer's own exchanges."""
        return sum(self.meter.bytes.values())

    @property
    def all_routes(self) -> list[Route]:
        """The route of every parameter in the optimizer."""
        return [route for routes in self.routes for route in routes]

    @property
    def device(self) -> torch.device:
        """Where matrices are computed."""
        units = [unit for group in self.param_groups for unit in self.units(group)]
        return units[0].placement.device

    def steps_taken(self) -> int:
        """By the matrices that are there now."""
        matrices = [p for g in self.param_groups if g["kind"] == "matrix" for p in g["params"]]
        counts = [self.state[p]["step"] for p in matrices if "step" in self.state.get(p, {})]
        return int(max(map(float, counts), default=0.0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step on the gradients that are there. A collective call of the group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.placer.prepare(self):
            return loss
        work = [(group, unit) for group in self.param_groups for unit in self.units(group)]
        weights = [[group["params"][i] for i in unit.tensors] for group, unit in work]
        grads = [[self.placer.gradient(p) for p in tensors] for tensors in weights]
        if any(grads) and all(grad is None for found in grads for grad in found):
            raise ValueError(
                "no parameter has a gradient; call backward() before step(), and zero_grad() after"
                " (or was the model wrapped or sharded after param_groups(model)?)"
            )
        if self.monitor:
            self.monitor.begin(self.steps_taken() + 1)
        for (_, unit), found in zip(work, grads, strict=True):  # all, before anything changes
            self._warn_of_missing(unit, found)
            unit.check_observers(len(self.observers))
        if self.options.check_finite:
            self._check_finite([unit for _, unit in work], grads)
        for (group, unit), tensors, found in zip(work, weights, grads, strict=True):
            step = self._step_matrices if group["kind"] == "matrix" else self._step_scalars
            step(group, unit, tensors, found)
        if self.monitor:
            self.monitor.write(self.meter)
        return loss

    def _step_scalars(
        self,
        group: dict[str, Any],
        unit: Unit,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> None:
        present = [(p, g) for p, g in zip(tensors, grads, strict=True) if g is not None]
        states = []
        for p, _ in present:
            state = self.state[p]
            state["step"] = state["step"].clone()  # a universal checkpoint shares it among states
            states.append({name: self.placer.local(value) for name, value in state.items()})
        self._scalar_update(
            group,
            group["lr"] * group["lr_ratio"],
            [self.placer.local(p) for p, _ in present],
            [g for _, g in present],
            states,
        )

    def _step_matrices(
        self,
        group: dict[str, Any],
        unit: Unit,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> None:
        for p, grad in zip(tensors, grads, strict=True):
            if grad is not None:
                self.state[p]["step"] = self.state[p]["step"] + 1
        if unit.blocks:
            present = [p for p, grad in zip(tensors, grads, strict=True) if grad is not None]
            unit = unit.at(strategy.steps(unit, [self.state[p]["step"] for p in present]))
        assert unit.exchange is not None
        weights = [self.placer.local(p) for p in tensors]
        momenta = []
        if self.rule.momentum:
            momenta = [self.placer.local(self.state[p]["exp_avg"]) for p in tensors]
        watch = self.monitor.watch(unit, group, self.rule) if self.monitor else None
        handle = Handle(group, unit.names, self.observers, watch)
        unit.exchange.run(MatrixStep(self.rule, group, unit, weights, grads, momenta, handle))
        self.polar_calls += handle.polar_calls

    def locate(self) -> None:
        """Find where everything lives, and make all states. A collective call, the first time."""
        self.placer.prepare(self)
        for group, tensors in self.placer.steps(self):
            self.units(group, tensors)

    def units(self, group: dict[str, Any], tensors: Sequence[Tensor] | None = None) -> list[Unit]:
        """The group's parameters by where they live, with their states there from the first call.

        ``tensors``: in place of those that the group has. A collective call, the first time.
        """
        tensors = list(group["params"] if tensors is None else tensors)
        if not tensors and not (self.placer.partial and self.routes[group["id"]]):
            return []
        self.placer.prepare(self)
        key = self.placer.key(group, tensors)
        if key not in self._units:
            located = self.placer.place(group, self.routes[group["id"]], tensors)
            self._units[key] = [self._plan(group, *found, tensors) for found in located]
        for unit in self._units[key]:
            for index, i in enumerate(unit.tensors):
                self._ensure_state(group, unit, index, tensors[i])
        return self._units[key]

    def _plan(
        self,
        group: dict[str, Any],
        placement: Placement,
        indices: tuple[int, ...],
        tensors: Sequence[Tensor],
    ) -> Unit:
        if group["kind"] != "matrix":
            return Unit(placement, indices)
        like = tensors[indices[0]] if indices else torch.empty(0, device=placement.device)
        wide = torch.promote_types(like.dtype, torch.float32)
        wire = wire_dtype(group, like.dtype, placement.device)
        numel = max(1, math.floor(self.options.bucket_mb * 2**20 / wire.itemsize))
        ranks, replicas = map(collectives.size, (placement.group, placement.replicas))
        if self.options.replicate_momentum and replicas == 1:
            warnings.warn(
                "replicate_momentum has no effect: no other rank holds the same parameters",
                stacklevel=4,
            )
        gram = strategy.in_slabs(self.options, group, placement, wire, bool(self.observers))
        state = partial(elements, self.rule, group)
        load = state if any(state(x.matrix.shape) for x in placement.layouts) else None
        plan = make_plan(placement.layouts, ranks, numel, replicas, gram=gram, load=load)
        exchange = Exchange(
            placement.layouts,
            plan,
            group=placement.group,
            replicas=placement.replicas,
            device=placement.device,
            home=torch.empty(0, dtype=wide, device=like.device),
            wire_dtype=wire,
            meter=self.meter,
        )
        kept = MatrixState(self.rule, group, placement.layouts, exchange) if load else None
        unit = Unit(placement, indices, plan, exchange, kept)
        return strategy.with_blocks(unit, self.options, numel)

    def _ensure_state(self, group: dict[str, Any], unit: Unit, index: int, p: Tensor) -> None:
        """Every parameter has its state from the start, so that all ranks have the same keys."""
        state = self.state[p]
        if "exp_avg" in state or ("step" in state and not self.rule.momentum):
            kept = unit.kept.numel.get(index, 0) if unit.alone else None
            if kept is not None and state["exp_avg"].numel() != kept:  # loaded whole
                state["exp_avg"] = unit.kept.pack(index, state["exp_avg"])
            return
        if group["kind"] != "matrix":
            state.update(adamw.new_state(p))
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        if self.rule.momentum:
            state["exp_avg"] = unit.momentum(index, p, self.placer.local(p))

    def matrix_parts(self) -> Iterator[Part]:
        """What this rank keeps of matrices, beside momentum: none before ``units`` was called."""
        for units in self._units.values():
            for unit in units:
                if unit.state is not None:
                    yield from unit.state.parts()

    def matrix_state(self) -> dict[str, dict[str, Tensor]]:
        """{matrix: {quantity: what this rank keeps of it}}; ``rules.rule.Kept`` says what."""
        found: dict[str, dict[str, Tensor]] = {}
        for part in self.matrix_parts():
            found.setdefault(part.matrix, {})[part.name] = part.values
        return found

    def state_dict(self) -> dict[str, Any]:
        """As torch's; of a rule that keeps matrix state, with "matrix_state" beside "state".

        Raises:
            ValueError: momentum (DistributedDataParallel) or matrix state is at owners alone, so
                that no rank has the whole of it.
        """
        units = [unit for units in self._units.values() for unit in units]
        if any(unit.alone for unit in units):
            raise ValueError(
                "under DistributedDataParallel a matrix's momentum is on its owner alone, so no"
                " rank's state_dict() is whole. Write spectral_dist.checkpoint.save(folder, model,"
                " optimizer) on every rank, or build the optimizer with replicate_momentum=True"
            )
        if self.placer.beside or not any(unit.state for unit in units):
            return super().state_dict()
        if any(unit.spread for unit in units):
            raise ValueError(
                f"{type(self).__name__} keeps its state at the owners of matrices, so no rank's"
                " state_dict() is whole. Write spectral_dist.checkpoint.save(folder, model,"
                " optimizer) on every rank"
            )
        return {**super().state_dict(), "matrix_state": self.matrix_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep the dtype they were saved in, whatever the parameter's."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        loaded = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, loaded, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                kept = self.state[p].get(name)  # None if a hook has dropped it
                if kept is not None and isinstance(value, Tensor) and value.dtype != kept.dtype:
                    self.state[p][name] = value.to(p.device, copy=True)
        if "matrix_state" in state_dict:
            self.locate()
            matrix_state.load(self.matrix_parts(), state_dict["matrix_state"])
            for call in self.after_load:
                call()

    def _check_finite(
        self, units: Sequence[Unit], grads: Sequence[Sequence[Tensor | None]]
    ) -> None:
        """Raise on every rank that shares parameters with one that has a bad gradient."""
        by_ranks: dict[tuple[Any, ...], list[int]] = {}
        for i, unit in enumerate(units):
            where = unit.placement
            key = (id(where.group), id(where.replicas), where.device)
            by_ranks.setdefault(key, []).append(i)
        for indices in by_ranks.values():
            where = units[indices[0]].placement
            found = [g for i in indices for g in grads[i] if g is not None and g.numel()]
            bad = torch.zeros((), dtype=torch.bool, device=where.device)
            if found:
                bad = (~torch.isfinite(torch.stack(_extremes(found))).all()).to(where.device)
            if not collectives.any_rank(bad, (where.group, where.replicas), self.meter):
                continue
            mine = []
            for i in indices:
                for name, index, start, numel in units[i].placement.spans:
                    grad = grads[i][index]
                    if grad is None:
                        continue
                    if not grad.reshape(-1)[start : start + numel].isfinite().all():
                        mine.append(name)
            texts = [", ".join(mine)]
            for group in (where.group, where.replicas):
                texts = collectives.gather_texts(", ".join(texts), group)
            names = list(dict.fromkeys(n for text in texts for n in text.split(", ") if n))
            shown = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
            raise ValueError(
                f"the gradient of {shown} is NaN or infinite, and was not applied. Look for the"
                " cause (lr, data, fp16 without loss scaling); check_finite=False turns this check"
                " off"
            )

    def _warn_of_missing(self, unit: Unit, grads: Sequence[Tensor | None]) -> None:
        for name, index, _, _ in unit.placement.spans:
            if grads[index] is None and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} has no gradient, so it is left as it is in this step", stacklevel=3
                )


def _extremes(grads: list[Tensor]) -> list[Tensor]:
    """Numbers that are finite exactly if the gradients are (sums would overflow)."""
    if grads[0].device.type == "cpu":  # where the norm takes twenty times as long
        return [extreme for grad in grads for extreme in torch.aminmax(grad)]
    return list(torch._foreach_norm(grads, ord=math.inf))


def wire_dtype(group: dict[str, Any], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a group's matrices travel: bfloat16 if their polar factor is computed so.

    Otherwise that of momentum: float16 would overflow before it is normalised.
    """
    if group["wire_dtype"] is not None:
        return DTYPES[group["wire_dtype"]]
    if "polar_dtype" not in group:
        return torch.promote_types(dtype, torch.float32)
    method = group.get("polar", "jordan")  # AdaNewton is computed as jordan is
    computed = resolve_dtype(method, group["polar_dtype"], dtype, device)
    return computed if computed == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
