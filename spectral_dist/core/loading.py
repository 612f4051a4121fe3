"""Copying, pickling and loading: the part of ``ShardedOptimizer`` that does so."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from spectral_dist._error_help import explained
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, Placement
from spectral_dist.placement.dtensor import MeshPlacement
from spectral_dist.rules.fields import plain
from spectral_dist.rules.group_options import RULE, check_shaping_options
from spectral_dist.rules.options import BaseOptions
from spectral_dist.sharding import collectives


class Loading(torch.optim.Optimizer):
    """An optimizer that can be copied and pickled, and that loads state dicts.

    Attributes:
        options_type: the class of its options.
        copied: the attributes that a copy takes over; ``begin`` sets the others.
    """

    options_type: ClassVar[type[BaseOptions]]
    copied: ClassVar[tuple[str, ...]] = ("options", "_warned", "_agreement")
    options: Any
    placement: Placement
    _warned: set[str]
    routes: list[list[ParamSpec]]

    @abstractmethod
    def begin(self, placement: Placement | None) -> None:
        """Set all attributes that are not copied."""

    @abstractmethod
    def prepare_placement(self) -> None:
        """Bring the placement up to date with the parameter groups."""

    @explained
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle is made of.

        Observers, the monitor, ``after_load`` and ``checks`` are left out, as torch's hooks are.

        Raises:
            ValueError: the optimizer takes its steps together with other ranks.
        """
        self._check_single_process()
        routes = [
            [replace(route, reference=None, replicas=None, wrapper=None) for route in routes]
            for routes in self.routes
        ]
        attributes = {name: self.__dict__[name] for name in self.copied}
        return {**super().__getstate__(), **attributes, "routes": routes}

    def _check_single_process(self) -> None:
        """Raise a ValueError if a framework has the parameters, or other ranks take part."""
        self.prepare_placement()
        why = ""
        if type(self.placement) is not MeshPlacement:
            why = "a framework has its parameters"
        elif any(collectives.size(group) > 1 for group in self.placement.world_groups()):
            why = "it takes its steps together with other ranks"
        if why:
            raise ValueError(
                f"this {type(self).__name__} cannot be copied or pickled, because {why}. Write"
                " spectral_dist.checkpoint.save(folder, model, optimizer) on every rank, build a"
                " second model and optimizer as the first were built, and load it there"
            )

    @explained
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` has returned; also called by torch at the end of a load."""
        if "options" in self.__dict__:
            super().__setstate__(state)
            return
        if "options" not in state:
            raise ValueError(
                f"this {type(self).__name__} was pickled by a release that left most of it out;"
                " build it anew and load its state_dict()"
            )
        super().__setstate__(state)
        self.routes = [
            [
                replace(route, reference=TensorWeakRef(p))
                for route, p in zip(routes, group["params"], strict=True)
            ]
            for routes, group in zip(state["routes"], self.param_groups, strict=True)
        ]
        self.begin(None)

    @abstractmethod
    def forget_last_step(self) -> None:
        """Forget what is known of steps before a load, which replaces all that they have done."""

    @property
    @abstractmethod
    def rule_name(self) -> str:
        """Return the name that checkpoints know the rule by."""

    @explained
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the dtype that states were saved in.

        Under plain torch it is a collective call of the ranks that train the model together.

        Raises:
            ValueError: on every rank, if on any of them the state is of another optimizer, does not
                fit this one or is not finite; then nothing has changed.
        """
        error: Exception | None = None
        try:
            self.check_loaded(state_dict)
        except (ValueError, TypeError) as raised:
            error = raised
        self.prepare_placement()
        by_rank = type(self.placement) is not MeshPlacement  # a framework may load rank by rank
        collectives.raise_together(error, () if by_rank else self.placement.world_groups())
        before = [dict(group) for group in self.param_groups]
        self.forget_last_step()
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            self.fill_in(group, old)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        loaded = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, loaded, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                cast = self.state[p].get(name)  # by torch; None if a hook has dropped it
                if cast is not None and isinstance(value, Tensor) and value.dtype != cast.dtype:
                    self.state[p][name] = value.to(p.device, copy=True)

    def check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError if a state dict is not of this optimizer."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        if not isinstance(groups, list) or not isinstance(state_dict.get("state"), Mapping):
            raise ValueError(
                f"this is no optimizer's state dict, with 'state' and 'param_groups': "
                f"{type(state_dict).__name__}"
            )
        for group in groups:
            self.check_rule(group)
        if len(self.routes) != len(self.param_groups):
            raise ValueError(
                f"this optimizer's param_groups, {len(self.param_groups)}, are not the"
                f" {len(self.routes)} that it was built with: something has replaced the list. Add"
                " groups with add_param_group, and build the optimizer with all that the"
                " checkpoint's had"
            )
        kinds, saved_kinds = (
            [f"{len(group['params'])} {group['kind']}" for group in param_groups]
            for param_groups in (self.param_groups, groups)
        )
        if kinds != saved_kinds:
            raise ValueError(
                f"this state dict's groups are of {saved_kinds} parameters, and this optimizer's of"
                f" {kinds}; build it as it was built when that was saved, with the same matrices,"
                " scalars and groups"
            )
        check_shaping_options(self.options_type, self.param_groups, groups)
        for group, saved in zip(self.param_groups, groups, strict=True):
            routes = self.routes[group["id"]]
            named = [route.name for route in routes] if len(routes) == len(group["params"]) else []
            for k, (p, i) in enumerate(zip(group["params"], saved["params"], strict=True)):
                name = named[k] if named else f"parameter {k} of a group of kind {group['kind']!r}"
                self._check_state(name, group["kind"], p, state_dict["state"].get(i, {}))

    def check_rule(self, group: Mapping[str, Any]) -> None:
        """Raise a ValueError if a saved group is another optimizer's; one without a rule passes."""
        if not isinstance(group, Mapping) or "kind" not in group or "params" not in group:
            raise ValueError(
                f"this state dict was saved by another optimizer than {self.rule_name}: its groups"
                " have no 'kind'. Leave it out, or make a checkpoint of torch.optim.Muon's or"
                " dion's with spectral-dist convert"
            )
        if group.get(RULE, self.rule_name) != self.rule_name:
            raise ValueError(
                f"this state was saved by {group[RULE]}, and neither can take the other's: build"
                f" spectral_dist.{group[RULE]}, or start {self.rule_name} without it"
            )

    def _check_state(self, name: str, kind: str, p: Tensor, state: Any) -> None:
        """Raise a ValueError for a saved state that a step cannot continue from.

        Args:
            name: of the parameter.
            kind: of its group.
            p: the parameter.
            state: that was saved.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"{name}: its state is {state!r:.60}, and no dict")
        step = plain(state.get("step", 0.0))
        if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step < math.inf:
            raise ValueError(f"{name}: its step is {step!r:.60}, which is no number of steps")
        for key in self.wanted_state(kind):
            if key not in state:
                if step:
                    raise ValueError(
                        f"{name} has taken {step:g} steps and has no {key}: this state dict is of"
                        " another optimizer"
                    )
                continue
            value = state[key]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = value.dtype if isinstance(value, Tensor) else f"{value!r:.60}"
                raise ValueError(f"{name}: its {key} is {what}, and no tensor of numbers")
            if value.shape != p.shape:
                raise ValueError(
                    f"{name} is {tuple(p.shape)}, and its {key} {tuple(value.shape)}: this state"
                    " dict is of another model"
                )
            if not bool(self.placement.local(value).isfinite().all()):
                raise ValueError(f"{name}: its {key} is NaN or infinite")

    def wanted_state(self, kind: str) -> tuple[str, ...]:
        """Return the names of the moments of a parameter of this kind that has been stepped."""
        return ("exp_avg", "exp_avg_sq")

    def fill_in(self, group: ParamGroup, before: ParamGroup) -> None:
        """Add options to a loaded group that an older release did not save.

        Args:
            group: that was loaded.
            before: the group before it was loaded.
        """
        self.check_rule({"params": (), **group})
        for name, value in before.items():
            group.setdefault(name, value)
