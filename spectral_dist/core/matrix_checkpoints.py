"""What an optimizer of matrices saves and loads: states of parameters, and of whole matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.core import matrix_state, whole_state
from spectral_dist.core.first_step import matrix_of
from spectral_dist.core.matrix_state import MatrixStatePart
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.core.units import ROWS, MatrixUnit
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement import whole_tensors
from spectral_dist.placement.base import ParamGroup
from spectral_dist.rules.base import Rule, StateSpec
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import BaseOptions, MatrixOptions
from spectral_dist.sharding.layout import Located


class MatrixCheckpoints(ShardedOptimizer):
    """The part of ``SpectralOptimizer`` that concerns checkpoints."""

    rule: ClassVar[Rule[Any]]
    options: MatrixOptions
    _consolidated: dict[int, dict[str, Tensor]] | None
    """{id of a parameter: states of it that were gathered from their owners since the last step}"""

    @property
    def rule_name(self) -> str:
        """Return the name that checkpoints know the rule by."""
        return type(self.rule).__name__

    @abstractmethod
    def rule_options(self, group: ParamGroup) -> Any:
        """Return the rule's options of a group of matrices, as it is now."""

    def matrix_parts(self) -> Iterator[MatrixStatePart]:
        """Yield the matrix state that this rank stores; none before ``units`` was called."""
        for unit in self.all_units:
            if isinstance(unit, MatrixUnit) and unit.state is not None:
                yield from unit.state.parts()

    def matrix_state(self) -> dict[str, dict[str, Tensor]]:
        """Return {matrix: {quantity: this rank's part}}; see ``rules.base.StateSpec``."""
        by_matrix: dict[str, dict[str, Tensor]] = {}
        for part in self.matrix_parts():
            by_matrix.setdefault(part.matrix, {})[part.name] = part.values
        return by_matrix

    @property
    def keeps_matrix_state(self) -> bool:
        """Return whether the rule keeps state of whole matrices, on any rank."""
        return any(self.kept_names().values())

    def kept_names(self) -> dict[str, set[str]]:
        """Return the names of the quantities that the rule keeps of each matrix, on any rank."""
        kept: dict[str, set[str]] = {}
        for group in self.param_groups:
            if group["kind"] == "matrix":
                options = self.rule_options(group)
                for matrix in (m for route in self.routes[group["id"]] for m in route.matrices):
                    kept[matrix.name] = set(self.rule.state(options, matrix.read_shape))
        return kept

    @property
    def has_momentum(self) -> bool:
        """Return whether the rule has the shard state ``exp_avg``."""
        return self.rule.has_momentum(self.options)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle is made of, matrix state included."""
        return {**super().__getstate__(), "matrix_state": self.matrix_state()}

    @explained
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` has returned."""
        whole = state.get("matrix_state")
        super().__setstate__({k: v for k, v in state.items() if k != "matrix_state"})
        if whole:
            self.initialize_state()
            matrix_state.load(self.matrix_parts(), whole)

    @explained
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with each matrix's state among those of its parameter.

        Matrix state of DTensors is DTensors, which torch's own functions shard, gather and save.
        If any parameter is a DTensor and the rule keeps matrix state, this is a collective call.

        Raises:
            ValueError: under DistributedDataParallel, if only owners store momentum or matrix
                state, and ``consolidate_state_dict`` was not called since the last step.
        """
        saved = super().state_dict()
        if self.placement.saves_matrix_state:
            return saved
        owned = self._consolidated
        if owned is None:
            self._check_no_owner_needed()
            owned = {}
            for p, name, whole in self._whole_matrix_state():
                value = whole_tensors.like_parameter(whole, p) if self._has_dtensors else whole
                owned.setdefault(id(p), {})[name] = value
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            for p, i in zip(group["params"], packed["params"], strict=True):
                if id(p) in owned:
                    saved["state"][i] = {**saved["state"][i], **owned[id(p)]}
        return saved

    @explained
    @torch.no_grad()
    def consolidate_state_dict(self) -> None:
        """Gather what owners alone store, so that state_dict() is whole on every rank.

        A collective call, for DistributedDataParallel and those who save ``state_dict()`` of one
        rank. What was gathered is on the host, and kept until the next step or load.

        Raises:
            ValueError: on a GPU, if the last step was not applied and its error not yet raised.
        """
        self.check_last_step()
        owned: dict[int, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for unit in self.units(group):
                if not isinstance(unit, MatrixUnit) or not unit.momentum_at_owner:
                    continue
                for index, i in enumerate(unit.tensors):
                    p = group["params"][i]
                    packed = self.state[p]["exp_avg"]
                    whole = torch.zeros_like(p, dtype=packed.dtype, memory_format=ROWS)
                    local = self.placement.local(whole)
                    whole_state.fill_momentum(unit, index, local, packed, self.meter)
                    owned.setdefault(id(p), {})["exp_avg"] = whole.cpu()
        if not self.placement.saves_matrix_state:
            for p, name, whole in self._whole_matrix_state():
                value = whole_tensors.like_parameter(whole, p)
                owned.setdefault(id(p), {})[name] = value.cpu()
        self._consolidated = owned

    @property
    def _has_dtensors(self) -> bool:
        """Return whether any parameter is a DTensor."""
        return any(
            whole_tensors.is_sharded(p) for group in self.param_groups for p in group["params"]
        )

    @property
    def needs_consolidation(self) -> bool:
        """Return whether ``state_dict`` is an error without ``consolidate_state_dict``."""
        if self.placement.saves_matrix_state:
            return self._spreads_momentum
        return self._spreads_momentum or (self._spreads_matrix_state and not self._has_dtensors)

    def _check_no_owner_needed(self) -> None:
        """Raise a ValueError if no rank's state dict is whole without a collective call."""
        if self._spreads_momentum:
            raise ValueError(
                "under DistributedDataParallel a matrix's momentum is on its owner alone, so no"
                " rank's state_dict() is whole. Write spectral_dist.checkpoint.save(folder, model,"
                " optimizer) on every rank, call optimizer.consolidate_state_dict() on every rank"
                " before, or build the optimizer with replicate_momentum=True"
            )
        if self._spreads_matrix_state and not self._has_dtensors:
            raise ValueError(
                f"{type(self).__name__} keeps its state at the owners of matrices, so no rank's"
                " state_dict() is whole. Write spectral_dist.checkpoint.save(folder, model,"
                " optimizer) on every rank, or call optimizer.consolidate_state_dict() on every"
                " rank before"
            )

    @property
    def _matrix_units(self) -> list[MatrixUnit]:
        """Return the units of matrices that have been located."""
        return [unit for unit in self.all_units if isinstance(unit, MatrixUnit)]

    @property
    def _spreads_momentum(self) -> bool:
        """Return whether only owners store momentum, so that no rank has all of it."""
        return any(unit.momentum_at_owner for unit in self._matrix_units)

    @property
    def _spreads_matrix_state(self) -> bool:
        """Return whether other ranks may store parts of the matrix state."""
        return any(unit.state_is_spread for unit in self._matrix_units)

    def _whole_matrix_state(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Yield (parameter, name among its states, whole tensor) of all matrix state.

        A collective call if any of it is spread. The tensors are as ``whole_state.matrix_state``
        yields them.
        """
        for group in self.param_groups:
            if group["kind"] != "matrix" or not self.all_units:
                continue
            options, routes = self.rule_options(group), self.routes[group["id"]]
            for unit in self.units(group):
                if not isinstance(unit, MatrixUnit) or unit.state is None:
                    continue
                holders = {
                    matrix.name: (routes[i], group["params"][i], place)
                    for i in unit.tensors
                    for place, matrix in enumerate(routes[i].matrices)
                }
                specs = [self.rule.state(options, shape) for shape in unit.read_shapes]
                for k, quantity, whole in whole_state.matrix_state(unit, specs, self.meter):
                    route, p, place = holders[unit.names[k]]
                    yield p, whole_state.state_name(route, place, quantity), whole

    @explained
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned, in the dtype that it was saved in.

        A collective call wherever ``state_dict`` is one.

        Raises:
            ValueError: the state is of another optimizer, of other matrices, or was saved with
                another value of an option that shapes it; then nothing has changed.
        """
        state_dict = self._with_former_key(state_dict)
        super().load_state_dict(state_dict)
        self._consolidated = None
        if not self.placement.saves_matrix_state and self.keeps_matrix_state:
            self._load_matrix_state(state_dict)
        for call in self.after_load:
            call()

    def _with_former_key(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict in which matrix state is among the states of parameters.

        Older releases kept it by matrix, as "matrix_state" beside "state".
        """
        groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
        if not groups or "matrix_state" not in state_dict:
            return state_dict
        if not all(isinstance(group, Mapping) and "params" in group for group in groups):
            return state_dict  # which ``check_loaded`` refuses
        saved = {i: dict(state) for i, state in state_dict["state"].items()}
        for group, former in zip(self.param_groups, groups, strict=False):
            for route, i in zip(self.routes[group["id"]], former["params"], strict=False):
                for place, matrix in enumerate(route.matrices):
                    for name, value in state_dict["matrix_state"].get(matrix.name, {}).items():
                        key = whole_state.state_name(route, place, name)
                        saved.setdefault(i, {})[key] = value
        return {"state": saved, "param_groups": groups}

    def check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError if a state dict is not of this optimizer."""
        super().check_loaded(state_dict)
        if not self.placement.saves_matrix_state and self.keeps_matrix_state:
            for state, specs in self._saved_matrix_states(state_dict):
                for name, (matrix, quantity, spec) in specs.items():
                    self._check_quantity(matrix, quantity, spec, state.get(name))

    def _state_names(self, group: ParamGroup, located: Located) -> tuple[tuple[str, ...], ...]:
        """Return the names of matrix state that state dicts have of each of a unit's parameters.

        Args:
            group: of matrices.
            located: the unit's parameters.
        """
        if self.placement.saves_matrix_state:
            return ((),) * len(located.tensors)
        options, routes = self.rule_options(group), self.routes[group["id"]]
        return tuple(tuple(self._specs_of(routes[i], options)) for i in located.tensors)

    def _specs_of(self, route: ParamSpec, options: Any) -> dict[str, tuple[str, str, StateSpec]]:
        """Return {name among a parameter's states: (matrix, quantity, spec)} of its matrices.

        Args:
            route: the parameter's spec.
            options: of its group, as the rule has them.
        """
        return {
            whole_state.state_name(route, place, quantity): (matrix.name, quantity, spec)
            for place, matrix in enumerate(route.matrices)
            for quantity, spec in self.rule.state(options, matrix.read_shape).items()
        }

    def _saved_matrix_states(
        self, state_dict: Mapping[str, Any]
    ) -> Iterator[tuple[Mapping[str, Any], dict[str, tuple[str, str, StateSpec]]]]:
        """Yield what a state dict has of each parameter with matrices that has been stepped.

        Yields:
            The parameter's saved state, and {name in that: (matrix, quantity, spec)}. Left out is
            state of older releases, which had none of matrices.
        """
        former = self.former_state().values()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if group["kind"] != "matrix":
                continue
            options, routes = self.rule_options(group), self.routes[group["id"]]
            for route, i in zip(routes, saved["params"], strict=True):
                state = state_dict["state"].get(i, {})
                if any(name in state for name in former):
                    continue
                specs = self._specs_of(route, options)
                if float(state.get("step", 0.0)) or any(name in state for name in specs):
                    yield state, specs

    def _check_quantity(self, matrix: str, quantity: str, spec: StateSpec, value: Any) -> None:
        """Raise a ValueError for what a state dict has of a matrix, if it cannot be taken."""
        if value is None:
            raise ValueError(
                f"this state dict lacks matrix state: it has no {quantity} of {matrix}. It was"
                " saved with another optimizer, or by a release that saved it without; resume with"
                " that optimizer, or leave its state out"
            )
        if not isinstance(value, Tensor):
            raise ValueError(f"{matrix}: its {quantity} is {value!r:.60}, and no tensor")
        matrix_state.check_shape(matrix, quantity, spec.shape, tuple(value.shape))
        if not whole_tensors.is_finite(value):
            raise ValueError(f"{matrix}: its {quantity} is NaN or infinite in the checkpoint")

    def _load_matrix_state(self, state_dict: Mapping[str, Any]) -> None:
        """Load matrix state, and that of older releases from the shard state that held it."""
        former, whole_former = self.former_state(), dict[str, dict[str, Tensor]]()
        for group in self.param_groups:
            for route, p in zip(self.routes[group["id"]], group["params"], strict=True):
                state = self.state.get(p, {})
                for name in [name for name in state if name.startswith(whole_state.PREFIX)]:
                    del state[name]  # torch has put it there, cast to the parameter's dtype
                if route.kind == "matrix":
                    held = {n: state.pop(n) for n in former.values() if n in state}
                    if held:
                        whole_former[route.name] = held
        if whole_former:
            self.load_former_state(whole_former)
        saved = list(self._saved_matrix_states(state_dict))
        if not saved:
            return
        self.initialize_state()
        parts = {(part.matrix, part.name): part for part in self.matrix_parts()}
        for state, specs in saved:
            for name, (matrix, quantity, _) in specs.items():
                whole = whole_tensors.whole(state[name])
                if (matrix, quantity) in parts:
                    whole_state.load(parts[matrix, quantity], whole)

    def wanted_state(self, kind: str) -> tuple[str, ...]:
        """Return the names of the moments of a parameter of this kind that has been stepped."""
        if kind != "matrix":
            return super().wanted_state(kind)
        return ("exp_avg",) if self.has_momentum else ()

    def former_state(self) -> dict[str, str]:
        """Return {quantity: name} of matrix state that older releases kept as shard state."""
        former: dict[str, str] = {}
        for group in self.param_groups:
            if group["kind"] == "matrix":
                options = self.rule_options(group)
                for matrix in (m for route in self.routes[group["id"]] for m in route.matrices):
                    specs = self.rule.state(options, matrix.read_shape)
                    former |= {name: s.formerly for name, s in specs.items() if s.formerly}
        return former

    def load_former_state(self, whole: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load matrix state from what older releases kept as shard state.

        Args:
            whole: {parameter: {shard state: its whole tensor}}.
        """
        former = self.former_state()
        saved = {
            matrix.name: {
                name: matrix_of(matrix, whole[route.name][old]) for name, old in former.items()
            }
            for route in self.all_routes
            for matrix in route.matrices
            if whole.get(route.name)
        }
        self.initialize_state()
        parts = [part for part in self.matrix_parts() if part.matrix in saved]
        matrix_state.load(parts, saved)


def learned_names(options: type[BaseOptions]) -> list[str]:
    """Return the options that training changes."""
    return [name for name, spec in specs_of(options).items() if spec.learned]
