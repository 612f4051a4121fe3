"""What every optimizer here copies and loads: the part of ``ShardedOptimizer`` that does so."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from spectral_dist.params.spec import Route
from spectral_dist.placement.base import ParamGroup, Placement
from spectral_dist.placement.dtensor import MeshPlacement
from spectral_dist.rules.group_options import check_shaping_options
from spectral_dist.rules.options import BaseOptions
from spectral_dist.sharding import collectives


class Loading(torch.optim.Optimizer):
    """An optimizer that can be copied and pickled, and loads state dicts.

    Attributes:
        copied: attributes that a copy has as well; the others it begins anew.
    """

    options_type: ClassVar[type[BaseOptions]]
    copied: ClassVar[tuple[str, ...]] = ("options", "_warned", "_agreement")
    options: Any
    placement: Placement
    routes: list[list[Route]]

    @abstractmethod
    def begin(self, placement: Placement | None) -> None:
        """Set all attributes that are not copied."""

    @abstractmethod
    def prepare_placement(self) -> None:
        """Have the placement look at the groups as they are now."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: all but what was added from outside.

        As torch leaves out hooks, observers, the monitor and ``after_load`` stay with the original.

        Raises:
            ValueError: the optimizer works together with other ranks.
        """
        self._check_alone()
        routes = [
            [replace(route, reference=None, replicas=None) for route in routes]
            for routes in self.routes
        ]
        own = {name: self.__dict__[name] for name in self.copied}
        return {**super().__getstate__(), **own, "routes": routes}

    def _check_alone(self) -> None:
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what ``__getstate__`` has returned, or at the end of a load torch's part."""
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the dtype that states were saved in.

        Raises:
            ValueError: state was saved with another value of an option that shapes it.
        """
        check_shaping_options(self.options_type, self.param_groups, state_dict["param_groups"])
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            self.fill_in(group, old)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        loaded = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, loaded, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                kept = self.state[p].get(name)  # None if a hook has dropped it
                if kept is not None and isinstance(value, Tensor) and value.dtype != kept.dtype:
                    self.state[p][name] = value.to(p.device, copy=True)

    def fill_in(self, group: ParamGroup, before: ParamGroup) -> None:
        """Give a group what it has not, as an older release has saved it; a load ends with it."""
        for name, value in before.items():
            group.setdefault(name, value)
