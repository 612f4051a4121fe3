"""What an optimizer of matrices saves and loads: states of parameters, and of whole matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.core import matrix_state
from spectral_dist.core.first_step import matrix_of
from spectral_dist.core.matrix_state import MatrixStatePart
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.core.units import MatrixUnit
from spectral_dist.placement.base import ParamGroup
from spectral_dist.rules.base import Rule
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import BaseOptions, MatrixOptions


class MatrixCheckpoints(ShardedOptimizer):
    """The part of ``SpectralOptimizer`` that concerns checkpoints."""

    rule: ClassVar[Rule[Any]]
    options: MatrixOptions

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
        """Return torch's state dict, with "matrix_state" beside "state" if the rule has any.

        Raises:
            ValueError: only owners store momentum (under DistributedDataParallel) or matrix state,
                so that no rank has all of it.
        """
        units = [unit for unit in self.all_units if isinstance(unit, MatrixUnit)]
        if any(unit.momentum_at_owner for unit in units):
            raise ValueError(
                "under DistributedDataParallel a matrix's momentum is on its owner alone, so no"
                " rank's state_dict() is whole. Write spectral_dist.checkpoint.save(folder, model,"
                " optimizer) on every rank, or build the optimizer with replicate_momentum=True"
            )
        if self.placement.saves_matrix_state or not any(unit.state for unit in units):
            return super().state_dict()
        if any(unit.state_is_spread for unit in units):
            raise ValueError(
                f"{type(self).__name__} keeps its state at the owners of matrices, so no rank's"
                " state_dict() is whole. Write spectral_dist.checkpoint.save(folder, model,"
                " optimizer) on every rank"
            )
        return {**super().state_dict(), "matrix_state": self.matrix_state()}

    @explained
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned, in the dtype that it was saved in.

        Raises:
            ValueError: the state is of another optimizer, of other matrices, or was saved with
                another value of an option that shapes it; then nothing has changed.
        """
        super().load_state_dict(state_dict)
        if "matrix_state" in state_dict:
            matrix_state.load(self.matrix_parts(), state_dict["matrix_state"])
        elif not self.placement.saves_matrix_state and self.keeps_matrix_state:
            self._load_without_matrix_state()
        for call in self.after_load:
            call()

    def check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError if a state dict is not of this optimizer."""
        super().check_loaded(state_dict)
        if "matrix_state" in state_dict:
            self.initialize_state()
            for part in self.matrix_parts():
                matrix_state.check(part, state_dict["matrix_state"])
        elif not self.placement.saves_matrix_state and self.keeps_matrix_state:
            self._check_without_matrix_state(state_dict)

    def wanted_state(self, kind: str) -> tuple[str, ...]:
        """Return the names of the moments of a parameter of this kind that has been stepped."""
        if kind != "matrix":
            return super().wanted_state(kind)
        return ("exp_avg",) if self.has_momentum else ()

    def _check_without_matrix_state(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError if a parameter has taken steps and its matrix state is missing."""
        former, missing = self.former_state(), []
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for route, i in zip(self.routes[group["id"]], saved["params"], strict=True):
                state = state_dict["state"].get(i, {})
                has_former = any(name in state for name in former.values())
                if route.kind == "matrix" and float(state.get("step", 0.0)) and not has_former:
                    missing.append(route.name)
        if missing:
            raise ValueError(
                f"this state dict has no matrix_state, in which {type(self).__name__} keeps what it"
                f" knows of {missing[0]} ({len(missing)} parameters): torch's"
                " get_optimizer_state_dict leaves it out. Save optimizer.state_dict() itself, or"
                " write spectral_dist.checkpoint.save(folder, model, optimizer)"
            )

    def _load_without_matrix_state(self) -> None:
        """Load matrix state from the shard state in which an older release has saved it."""
        whole: dict[str, dict[str, Tensor]] = {}
        former = self.former_state()
        for group in self.param_groups:
            if group["kind"] != "matrix":
                continue
            for route, p in zip(self.routes[group["id"]], group["params"], strict=True):
                state = self.state.get(p, {})
                whole[route.name] = {n: state.pop(n) for n in former.values() if n in state}
        if any(whole.values()):
            self.load_former_state(whole)

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
