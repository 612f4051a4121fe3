"""The optimizer of every rule: the rule on whole matrices, AdamW on the rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core import batching, strategy
from spectral_dist.core.agreement import Grads
from spectral_dist.core.matrix_checkpoints import MatrixCheckpoints, learned_names
from spectral_dist.core.matrix_ops import StepContext
from spectral_dist.core.matrix_state import MatrixState
from spectral_dist.core.matrix_step import MatrixStep
from spectral_dist.core.monitor import Watch
from spectral_dist.core.teams import agreed_host_team, given_machine, has_choice, warn_no_effect
from spectral_dist.core.units import MatrixUnit, Unit
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, Placement
from spectral_dist.rules.base import Pooling, Shape
from spectral_dist.rules.fields import betas_problem, plain
from spectral_dist.rules.options import BaseOptions, MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.layout import Located


class SpectralOptimizer(MatrixCheckpoints):
    """A rule for matrices and AdamW for the rest; see ``ShardedOptimizer``.

    Attributes:
        polar_calls: how many matrices this rank has orthogonalized.
    """

    copied = (*MatrixCheckpoints.copied, "polar_calls", "_momenta")

    def __init__(self, params: Iterable[Any], lr: float | None = None, **options: Any) -> None:
        self.polar_calls = 0
        self._momenta: dict[int, float] = {}
        super().__init__(params, lr, **options)

    def begin(self, placement: Placement | None) -> None:
        """Set all attributes that are not copied, as before the first step."""
        super().begin(placement)
        self._watches: list[Watch] | None = None
        self._consolidated = None
        self._pooled: dict[Shape, Tensor] | None = None
        self._observer_error: Exception | None = None
        self._rule_options: dict[int, tuple[list[Any], MatrixOptions]] = {}
        self._steps_of_blocks: dict[int, int] = {}

    # -- options

    def finalize_group(self, carried: ParamGroup, routes: Sequence[ParamSpec]) -> ParamGroup:
        """Return a new group with the options that the rule prepares for its matrices.

        A group of matrices also gets ``betas``, for schedulers that cycle it: its first number and
        ``momentum`` are kept equal, whichever is written.

        Args:
            carried: the options of the group.
            routes: the specs of its parameters.
        """
        if carried["kind"] != "matrix":
            return carried
        names = self.options_type.names("matrix")
        options = replace(self.options, **{name: carried[name] for name in names})
        carried.update(self._prepared(options, routes))
        self._momenta[len(self.routes)] = carried["momentum"]
        return {**carried, "betas": (carried["momentum"], self.options.betas[1])}

    def _prepared(self, options: MatrixOptions, routes: Sequence[ParamSpec]) -> dict[str, Any]:
        """Return the options of a group of matrices, as the rule prepares them for their shapes."""
        shapes = {m.name: m.read_shape for route in routes for m in route.matrices}
        prepared = self.rule.prepare(options, shapes)
        return {name: getattr(prepared, name) for name in self.options_type.names("matrix")}

    def rule_options(self, group: ParamGroup) -> Any:
        """Return the rule's options for a group of matrices, from the group's current values."""
        names = self.options_type.names("matrix")
        values = [plain(group[name]) for name in names]
        cached = self._rule_options.get(group["id"])
        if cached is not None and self._is_failing:
            return cached[1]
        if cached is None or cached[0] != values:
            options = replace(self.options, **dict(zip(names, values, strict=True)))
            cached = self._rule_options[group["id"]] = values, options
        return cached[1]

    def check_group(self, group: ParamGroup) -> None:
        """Copy what a scheduler has written into ``betas`` to ``momentum``, and check all options.

        Raises:
            ValueError: a bad value.
        """
        if group["kind"] != "matrix" or "betas" not in group:
            super().check_group(group)
            return
        problem = betas_problem(group["betas"])
        if problem:
            raise ValueError(f"a parameter group: betas is {group['betas']!r}; {problem}")
        beta1, beta2 = group["betas"]
        if beta1 != self._momenta[group["id"]]:
            group["momentum"] = beta1
        super().check_group(group)
        # betas follow what was written into momentum, once that is known to be good
        group["betas"] = (group["momentum"], beta2)
        self._momenta[group["id"]] = group["momentum"]

    def take_over(self, group: ParamGroup, options: BaseOptions) -> None:
        """Let a rule that learns some of its options prepare those that were written anew."""
        if group["kind"] == "matrix" and learned_names(self.options_type):
            assert isinstance(options, MatrixOptions)
            group.update(self._prepared(options, self.routes[group["id"]]))

    def fill_in(self, group: ParamGroup, before: ParamGroup) -> None:
        """Add options to a loaded group that an older release did not save."""
        if group["kind"] == "matrix":
            group.setdefault("betas", (group["momentum"], self.options.betas[1]))
            # a scheduler writes ``betas`` after the step, so it is newer than ``momentum``
            group["momentum"] = self._momenta[before["id"]] = group["betas"][0]
        super().fill_in(group, before)

    # -- one step

    def begin_step(self, watches: list[Watch] | None) -> None:
        """Begin a step: set where the monitor records, and whether the step pools values."""
        self._consolidated = None
        self._watches = watches
        pooling = self._pooling()
        self._pooled = None
        if pooling is not None and (self.steps_taken() + 1) % pooling.every == 0:
            self._check_whole(pooling)
            self._pooled = {}

    def end_step(self) -> None:
        """Adapt the rule's options to pooled values, and raise an error that an observer raised."""
        if self._pooled is not None:
            self._adapt(self._pooled)
        if self._agreement.is_observed:
            error, self._observer_error = self._observer_error, None
            collectives.raise_together(error, self.placement.world_groups())

    def step_matrices(
        self, group: ParamGroup, unit: Unit, tensors: Sequence[Tensor], grads: Grads
    ) -> None:
        """Take the rule's step on a unit of matrices; a collective call.

        Args:
            group: the parameter group.
            unit: of matrices.
            tensors: the unit's parameters.
            grads: their local gradients.
        """
        assert isinstance(unit, MatrixUnit)
        states = [self.state[p] for p in tensors]
        present = [s for s, grad in zip(states, grads, strict=True) if grad is not None]
        self.count_step(present)
        if unit.blocks:
            unit = unit.at(self._count_with_blocks(unit, present))
        options, lr = self.rule_options(group), self._lr_in_step(group)
        watch = None
        if self._watches is not None:
            watch = Watch(unit.located, self.rule, options, lr)
            self._watches.append(watch)
        observers = tuple(self.observers) if self._agreement.is_observed else ()
        context = StepContext(
            self.rule, options, unit.names, observers, watch, self._pooled, self._last_step
        )
        local = self.placement.local
        stored = [local(p) for p in tensors]
        if unit.has_momentum:
            stored += [local(state["exp_avg"]) for state in states]
        row_major = [tensor.contiguous() for tensor in stored]  # copies of channels_last ones only
        weights, momenta = row_major[: len(tensors)], row_major[len(tensors) :]
        unit.exchange.run(MatrixStep(context, unit, lr, weights, grads, momenta))
        for tensor, contiguous in zip(stored, row_major, strict=True):
            if contiguous is not tensor:
                tensor.copy_(contiguous)
        self.polar_calls += context.polar_calls
        self._observer_error = self._observer_error or context.observer_error

    def _lr_in_step(self, group: ParamGroup) -> float:
        """Return a group's learning rate; 0 if this rank's options are wrong in this step."""
        return 0.0 if self._is_failing else self.lr_of(group)

    def _count_with_blocks(self, unit: MatrixUnit, states: Sequence[dict[str, Tensor]]) -> int:
        """Return how many steps a unit with blocks has taken, this one included.

        The ranks agree on it in their first step and after a load; then each counts by itself.
        """
        counts = self._steps_of_blocks
        if id(unit) not in counts:
            taken = strategy.global_step_count(unit, [state["step"] for state in states])
            counts[id(unit)] = taken
        else:
            counts[id(unit)] += 1
        if self._last_step is not None:
            self._last_step.undo.append(partial(counts.update, {id(unit): counts[id(unit)] - 1}))
        return counts[id(unit)]

    def forget_last_step(self) -> None:
        """Forget the last step and the counts of steps, which a load replaces."""
        super().forget_last_step()
        self._steps_of_blocks.clear()

    def can_skip(self) -> bool:
        """Return whether a flag on the device can keep a step from changing anything."""
        return super().can_skip() and self.rule.can_skip()

    def is_reported(self) -> bool:
        """Return whether the host must know about the coming step, which pools or is reported."""
        pooling = self._pooling()
        pools = pooling is not None and (self.steps_taken() + 1) % pooling.every == 0
        return pools or super().is_reported()

    def check_observers(self) -> None:
        """Raise a ValueError if there are observers, but matrices are in slabs or blocks."""
        units = [unit for unit in self.all_units if isinstance(unit, MatrixUnit)]
        if self.observers and not all(unit.has_whole_matrices for unit in units):
            raise ValueError(
                "an observer (calibrate's recorder, or one of your own) gets whole matrices, but"
                " under strategy 'gram', 'split' or 'block' no rank has them; build the optimizer"
                " with strategy='owner'"
            )

    # -- where everything is

    def make_unit(self, group: ParamGroup, located: Located, tensors: Sequence[Tensor]) -> Unit:
        """Build a unit, with a plan and an exchange for matrices; a collective call.

        Args:
            group: the parameter group.
            located: its parameters that are sharded alike.
            tensors: all of the group's tensors.
        """
        if group["kind"] != "matrix":
            return super().make_unit(group, located, tensors)
        options = self.rule_options(group)
        like = tensors[located.tensors[0]] if located.tensors else None
        dtype, device = (like.dtype, like.device) if like is not None else (None, located.device)
        dtype = dtype or torch.float32
        ranks, num_replicas = map(collectives.size, (located.group, located.replicas))
        if options.machine is not None and not has_choice(options, ranks, num_replicas):
            warn_no_effect(options, located.layouts, "machine")
        if options.replicate_momentum and num_replicas == 1:
            warnings.warn(
                "replicate_momentum has no effect: no other rank holds the same parameters",
                stacklevel=5,
            )
        groups = (located.group, located.replicas)
        is_observed = bool(self.observers)
        if max(ranks, num_replicas) > 1:
            observed = torch.tensor(is_observed, device=located.device)
            is_observed = collectives.any_rank(observed, groups, collectives.Meter())
        host_team = agreed_host_team(options, located)
        plan, wire = strategy.plan_of(self.rule, options, located, dtype, is_observed, host_team)
        exchange = Exchange(
            located.layouts,
            plan,
            group=located.group,
            replicas=located.replicas,
            device=located.device,
            like=torch.empty(0, dtype=torch.promote_types(dtype, torch.float32), device=device),
            wire_dtype=wire,
            meter=self.meter,
            rounds_alike=lambda matrix, count: batching.rounds_alike(
                self.rule, options, matrix.read_shape, count, wire
            ),
            machine=given_machine(options),
        )
        shapes = {layout.matrix.shape for layout in located.layouts}
        keeps_state = any(self.rule.state(options, shape) for shape in shapes)
        state = MatrixState(self.rule, options, located.layouts, exchange) if keeps_state else None
        has_momentum = self.rule.has_momentum(options)
        names = self._state_names(group, located)
        unit = MatrixUnit(located, plan, exchange, has_momentum, state, state_names=names)
        return strategy.add_blocks(unit, self.rule, options)

    def ensure_state(self, group: ParamGroup, unit: Unit, index: int, p: Tensor) -> None:
        """Create a parameter's state, before the first step, so that all ranks have equal keys.

        Momentum that was loaded whole is cut to what this rank stores of it. Matrix state has its
        names there, with empty tensors: torch looks for the names when it loads flattened states.

        Args:
            group: the parameter group.
            unit: that has the parameter.
            index: of the parameter in the unit.
            p: the parameter.
        """
        state = self.state[p]
        if not isinstance(unit, MatrixUnit):
            super().ensure_state(group, unit, index, p)
            return
        for name in unit.state_names[index]:
            state.setdefault(name, torch.empty(0, dtype=torch.float32, device="cpu"))
        if "exp_avg" in state:
            if unit.momentum_at_owner:
                numel = unit.momentum_runs.numel.get(index, 0)
                if state["exp_avg"].numel() != numel:  # loaded whole
                    state["exp_avg"] = unit.momentum_runs.pack(index, state["exp_avg"])
            return
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        if unit.has_momentum:
            state["exp_avg"] = unit.new_momentum(index, p, self.placement.local(p))

    # -- what is pooled over all matrices

    def _pooling(self) -> Pooling | None:
        """Return what the rule pools over all matrices, if anything."""
        groups = [group for group in self.param_groups if group["kind"] == "matrix"]
        return self.rule.pooling(self.rule_options(groups[0])) if groups else None

    def _check_whole(self, pooling: Pooling) -> None:
        """Raise a ValueError if a step has only a part of a group: options would change within."""
        for group in self.param_groups:
            if group["kind"] == "matrix" and group["params"]:
                num_matrices = sum(len(unit.located.layouts) for unit in self.units(group))
                if num_matrices < sum(len(r.matrices) for r in self.routes[group["id"]]):
                    raise ValueError(
                        f"{pooling.setting} is {pooling.every}, but ZeRO-3 steps on a part of"
                        " the matrices at a time; set zero_optimization.sub_group_size above the"
                        f" number of parameters, or {pooling.setting} to 0"
                    )

    def _adapt(self, pooled: dict[Shape, Tensor]) -> None:
        """Sum pooled values over all ranks, and let the rule adapt every group's options."""
        pooling = self._pooling()
        assert pooling is not None
        matrices = [m for route in self.all_routes for m in route.matrices]
        shapes = sorted({(min(m.shape), max(m.shape)) for m in matrices})
        zeros = torch.zeros(pooling.size, dtype=torch.float64)
        table = torch.stack([pooled.get(shape, zeros).to(self.device) for shape in shapes])
        for ranks in self.placement.world_groups():
            collectives.sum_ranks(table, ranks, self.meter)
        sums = dict(zip(shapes, table.cpu().unbind(), strict=True))
        for group in self.param_groups:
            if group["kind"] == "matrix":
                adapted = self.rule.adapt(self.rule_options(group), sums)
                group.update({n: getattr(adapted, n) for n in learned_names(self.options_type)})
