"""The one step() loop: where a rule on whole matrices meets wherever the matrices live."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectral_dist import groups as routing
from spectral_dist.groups import Route
from spectral_dist.options import Options, group_options
from spectral_dist.placement import Placer, WholeParameters
from spectral_dist.polar import DTYPES, polar, resolve_dtype
from spectral_dist.rules import adamw
from spectral_dist.rules.muon import Muon as MuonRule
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.exchange import Exchange, Piece
from spectral_dist.sharding.layout import Placement
from spectral_dist.sharding.plan import Plan, make_plan


@dataclass(frozen=True)
class _Unit:
    """A placement, and for matrices its plan and exchange."""

    placement: Placement
    plan: Plan | None = None
    exchange: Exchange | None = None


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, with the same numbers under every layout.

    Args:
        params: ``spectral_dist.param_groups(model)``; or parameters, or groups of them, that
            ``spectral_dist.tag(model)`` has tagged.
        lr: learning rate of the matrices, and of the rest unless ``scalar_lr`` is given.
        process_group: the ranks that hold replicas (DistributedDataParallel): each matrix is then
            orthogonalized on one of them. None: this process alone.
        options: see ``spectral_dist.options.Options`` for names and defaults.

    Attributes:
        polar_calls: matrices this rank has orthogonalized.
        meter: calls and bytes of this rank's exchanges; ``comm_bytes`` is their sum.

    Raises:
        ValueError: unknown or bad options, frozen or untagged parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = Options.lr,
        *,
        process_group: Group = None,
        **options: Any,
    ) -> None:
        self.options = Options.from_user({"lr": lr, **options}, type(self).__name__)
        self.rule = MuonRule()
        self.placer: Placer = WholeParameters(process_group)
        self.meter = Meter()
        self.polar_calls = 0
        self.routes: list[list[Route]] = []
        self._units: dict[object, _Unit] = {}
        self._warned: set[str] = set()
        self._scalar_update = adamw.BACKENDS[self.options.scalar_backend]()
        super().__init__(routing.grouped(params), {"lr": self.options.lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; a group of both kinds becomes two."""
        for group in routing.grouped([param_group]):
            options = group_options(group, self.options)
            options["id"] = len(self.routes)
            self.routes.append(group["routes"])
            super().add_param_group({**options, "params": group["params"]})

    @property
    def comm_bytes(self) -> int:
        """Bytes that this rank has sent to others in this optimizer's own exchanges."""
        return sum(self.meter.bytes.values())

    @property
    def all_routes(self) -> list[Route]:
        """The route of every parameter in the optimizer."""
        return [route for routes in self.routes for route in routes]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step on the gradients that are there. A collective call of the group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.placer.prepare(self):
            return loss
        work = [(g, list(g["params"])) for g in self.param_groups if g["params"]]
        if all(p.grad is None for _, tensors in work for p in tensors):
            raise ValueError(
                "no parameter has a gradient; call backward() before step(), and zero_grad() after"
            )
        units = [self._unit(group, tensors) for group, tensors in work]
        for unit, (_, tensors) in zip(units, work, strict=True):  # all, before anything changes
            self._warn_of_missing(unit, tensors)
            if self.options.check_finite:
                self._check_finite(unit, tensors)
        for unit, (group, tensors) in zip(units, work, strict=True):
            if group["kind"] == "matrix":
                self._step_matrices(group, tensors, unit)
            else:
                self._step_scalars(group, tensors)
        return loss

    def _step_scalars(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        tensors = [p for p in tensors if p.grad is not None]
        for p in tensors:
            if "exp_avg" not in self.state[p]:
                self.state[p].update(adamw.new_state(p))
        grads = [p.grad for p in tensors if p.grad is not None]
        states = [self.state[p] for p in tensors]
        for state in states:  # a universal checkpoint hands one tensor to several states
            state["step"] = state["step"].clone()
        self._scalar_update(group, group["lr"] * group["lr_ratio"], tensors, grads, states)

    def _step_matrices(self, group: dict[str, Any], tensors: list[Tensor], unit: _Unit) -> None:
        """Accumulate, exchange, direction, exchange, settle: the picture of the house."""
        exchange, rule = unit.exchange, self.rule
        assert exchange is not None
        lr = group["lr"] * group["lr_ratio"]
        shapes = [layout.matrix.shape for layout in unit.placement.layouts]
        momenta = [self._momentum(p) for p in tensors]
        grads = [_like(p.grad, m) for p, m in zip(tensors, momenta, strict=True)]
        present = {i for i, p in enumerate(tensors) if p.grad is not None}
        rule.accumulate(group, [momenta[i] for i in present], [grads[i] for i in present])
        for i in present:
            self.state[tensors[i]]["step"] = self.state[tensors[i]]["step"] + 1
        grad_of, momentum_of, weight_of = map(exchange.views, (grads, momenta, tensors))

        def request(pieces: list[Piece]) -> list[Tensor]:
            return rule.request(
                group, [momentum_of[p] for p in pieces], [grad_of[p] for p in pieces]
            )

        def direction(matrices: Tensor) -> Tensor:
            return rule.direction(matrices, partial(self._polar, group))

        def settle(pieces: list[Piece], directions: list[Tensor]) -> None:
            kept = [i for i, piece in enumerate(pieces) if piece.tensor in present]
            rule.settle(
                group,
                lr,
                [weight_of[pieces[i]] for i in kept],
                [directions[i] for i in kept],
                [shapes[pieces[i].matrix] for i in kept],
            )

        exchange.run(request, direction, settle)

    def _polar(self, group: dict[str, Any], matrices: Tensor) -> Tensor:
        self.polar_calls += matrices.shape[0]
        return polar(
            matrices,
            method=group["polar"],
            steps=group["polar_steps"],
            compute_dtype=group["polar_dtype"],
        )

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "exp_avg" not in state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
        momentum: Tensor = state["exp_avg"]
        return momentum

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

    def _unit(self, group: dict[str, Any], tensors: list[Tensor]) -> _Unit:
        key = self.placer.key(group, tensors)
        unit = self._units.get(key)
        if unit is None:
            placement = self.placer.place(group, self.routes[group["id"]], tensors)
            unit = self._units[key] = self._plan(group, placement, tensors[0])
        return unit

    def _plan(self, group: dict[str, Any], placement: Placement, like: Tensor) -> _Unit:
        if group["kind"] == "scalar":
            return _Unit(placement)
        wire = wire_dtype(group, like.dtype, placement.device)
        numel = max(1, math.floor(self.options.bucket_mb * 2**20 / wire.itemsize))
        plan = make_plan(placement.layouts, collectives.size(placement.group), numel)
        exchange = Exchange(
            placement.layouts,
            plan,
            group=placement.group,
            device=placement.device,
            home=self._momentum(like),
            wire_dtype=wire,
            meter=self.meter,
        )
        return _Unit(placement, plan, exchange)

    def _check_finite(self, unit: _Unit, tensors: list[Tensor]) -> None:
        grads = [p.grad for p in tensors if p.grad is not None and p.numel()]
        device = unit.placement.device
        bad = torch.zeros((), dtype=torch.bool, device=device)
        if grads:
            bad = (~torch.isfinite(torch.stack(_extremes(grads))).all()).to(device)
        if not collectives.any_rank(bad, unit.placement.group, self.meter):
            return
        mine = []
        for name, index, start, numel in unit.placement.spans:
            grad = tensors[index].grad
            if grad is not None and not grad.reshape(-1)[start : start + numel].isfinite().all():
                mine.append(name)
        texts = collectives.gather_texts(", ".join(mine), unit.placement.group)
        names = list(dict.fromkeys(name for text in texts for name in text.split(", ") if name))
        shown = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
        raise ValueError(
            f"the gradient of {shown} is NaN or infinite, and was not applied. Look for the"
            " cause (lr, data, fp16 without loss scaling); check_finite=False turns this check off"
        )

    def _warn_of_missing(self, unit: _Unit, tensors: list[Tensor]) -> None:
        for name, index, _, _ in unit.placement.spans:
            if tensors[index].grad is None and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} has no gradient, so it is left as it is in this step", stacklevel=3
                )


def _extremes(grads: list[Tensor]) -> list[Tensor]:
    """Numbers that are finite exactly if the gradients are (sums would overflow)."""
    if grads[0].device.type == "cpu":  # where the norm takes twenty times as long
        return [extreme for grad in grads for extreme in torch.aminmax(grad)]
    return list(torch._foreach_norm(grads, ord=math.inf))


def _like(value: Tensor | None, momentum: Tensor) -> Tensor:
    """``value`` in the momentum's dtype, on its device; zeros for a missing gradient."""
    return torch.zeros_like(momentum) if value is None else value.to(momentum).contiguous()


def wire_dtype(group: dict[str, Any], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a group's matrices travel: bfloat16 if their polar factor is computed so.

    Otherwise that of the momentum: float16 would overflow before it is normalised.
    """
    if group["wire_dtype"] is not None:
        return DTYPES[group["wire_dtype"]]
    computed = resolve_dtype(group["polar"], group["polar_dtype"], dtype, device)
    return computed if computed == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
