"""The torch optimizer inside each of Megatron's: it takes the groups that Megatron has made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.matrix_checkpoints import learned_names
from spectral_dist.core.named import class_of
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.core.units import MatrixUnit
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.sharding.exchange import Piece
from spectral_dist.sharding.gather import from_owners

STATE = "spectral"
"""Key under which every group of a checkpoint has what all groups share."""


class InsideMegatron(ShardedOptimizer):
    """Speaks the checkpoint format of the Adam that Megatron expects in its place.

    Megatron finds saved groups by its own few keys, which may be those of several groups: so the
    groups' options are never loaded (flags set them, as they do Adam's), and what must be loaded is
    in every group alike.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.taken = 0
        self._megatron_keys: list[list[str]] = []
        self._gathering = self._dressed = False
        super().__init__(groups, **options)

    def mark(self) -> dict[str, Any]:
        """What a group of a checkpoint has that says whose it is."""
        return {STATE: {"optimizer": type(self).__name__}}

    def keep_keys(self, keys: Sequence[Sequence[str]]) -> None:
        """The keys of each group that are Megatron's, which its checkpoints need to have."""
        self._megatron_keys = [list(names) for names in keys]

    def steps_taken(self) -> int:
        """Counted, since a rank may have no matrix."""
        return self.taken

    def steps_of(self, group: dict[str, Any]) -> int:
        """That a group's parameters have in their states."""
        return self.taken

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As every optimizer's."""
        loss = super().step(closure)
        self.taken += 1
        return loss

    def prepare(self) -> None:
        """Make every state. A collective call, the first time."""
        for group in self.param_groups:
            self.units(group)

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """All ranks call ``state_dict()`` inside: it may bring momentum together."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's Adam would: whole momentum for every parameter, and ``step``.

        Raises:
            ValueError: momentum is at owners alone, and this is not a call on all ranks.
        """
        units = [
            (group, unit)
            for group in self.param_groups
            for unit in self.units(group)
            if isinstance(unit, MatrixUnit)
        ]
        if any(unit.state for _, unit in units) and not self._gathering:
            raise ValueError(
                "a matrix's state is on its owner alone, and this checkpoint is written without the"
                " other ranks. Write --ckpt-format torch_dist"
            )
        whole: dict[Tensor, Tensor] = {}
        for group, unit in units:
            if unit.momentum_at_owner:
                whole.update(self._whole(group, unit))
        numbers = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        step = torch.tensor(float(self.taken))
        state = {i: {"step": step.clone(), **self.state[p]} for p, i in numbers.items()}
        for p, momentum in whole.items():
            state[numbers[p]]["exp_avg"] = momentum
        shared: dict[str, Any] = {**self.mark()[STATE], "step": self.taken}
        for name in learned_names(self.options_type):
            shared[name] = {}
            for group in self.param_groups:
                shared[name].update(group.get(name) or {})
        groups = []
        for group, keys in zip(self.param_groups, self._megatron_keys, strict=True):
            kept = {key: group[key] for key in keys}
            members = [numbers[p] for p in group["params"]]
            groups.append({**kept, "step": self.taken, STATE: shared, "params": members})
        return {"state": state, "param_groups": groups}

    def _whole(self, group: dict[str, Any], unit: MatrixUnit) -> dict[Tensor, Tensor]:
        """Return the whole momentum of each of the unit's parameters."""
        if not self._gathering:
            raise ValueError(
                "a matrix's momentum is on its owner alone, and this checkpoint is written without"
                " the other ranks. Write --ckpt-format torch_dist, with --use-distributed-optimizer"
                " or not, or pass replicate_momentum (--spectral-replicate-momentum)"
            )
        tensors = [group["params"][i] for i in unit.tensors]
        whole = [torch.zeros_like(p, dtype=self.state[p]["exp_avg"].dtype) for p in tensors]
        kept: dict[Piece, Tensor] = {}
        for index, p in enumerate(tensors):
            kept |= unit.momentum_runs.packed_views(index, self.state[p]["exp_avg"])
        from_owners(unit.exchange, kept, unit.exchange.local_runs.views(whole))
        return dict(zip(tensors, whole, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, on any number of ranks; options stay as they are here."""
        saved = state_dict["param_groups"]
        shared: dict[str, Any] = next((g[STATE] for g in saved if g.get(STATE)), {})
        groups = [
            {**{k: v for k, v in own.items() if k != "params"}, "params": other["params"]}
            for own, other in zip(self.param_groups, saved, strict=True)
        ]
        step = next((g["step"] for g in saved if g.get("step") is not None), 0)
        self.taken = int(shared.get("step", step))
        state = {key: dict(value) for key, value in state_dict["state"].items()}
        for value in state.values():
            if "step" not in value:  # TransformerEngine's Adam has it in the group
                value["step"] = torch.tensor(float(self.taken))
        super().load_state_dict({"state": state, "param_groups": groups})
        if self._dressed:
            self._dress()
        for name in learned_names(self.options_type):
            for group in self.param_groups:
                table = group.get(name)
                if table:
                    saved_table = shared.get(name, {})
                    group[name] = {key: saved_table.get(key, table[key]) for key in table}

    @contextlib.contextmanager
    def as_adam(self) -> Iterator[None]:
        """States that the distributed optimizer can copy buffer by buffer: Adam's two, no scalar.

        Of a matrix, ``exp_avg_sq`` (and of a rule without momentum ``exp_avg``) is zeros, for as
        long as this takes.
        """
        if self._dressed:  # Megatron loads inside of what it does to save
            yield
            return
        self._dressed = True
        self._dress()
        try:
            yield
        finally:
            self._dressed = False
            has_momentum = not isinstance(self, SpectralOptimizer) or self.has_momentum
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["step"] = torch.tensor(float(self.steps_of(group)))
                    if group["kind"] == "matrix":
                        for name in ("exp_avg", "exp_avg_sq")[int(has_momentum) :]:
                            self.state[p].pop(name, None)

    def _dress(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.pop("step", None)
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(p, dtype=torch.float32)


class SpectralPOET(InsideMegatron, POET):
    """``spectral_dist.POET`` as --optimizer spectral_poet.

    Steps since the last merge are counted, since a rank may have no skew parameter in its shard.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.since = 0
        super().__init__(groups, **options)
        self._ramp_asked = True  # by ``merging``

    def require_layers(self) -> None:
        """Do nothing: the optimizer of a stage's experts, say, may have no rotated layer."""

    def steps_taken(self) -> int:
        """In all."""
        return self.taken

    def steps_since_merge(self) -> int:
        """Of the skew parameters, wherever they are."""
        return self.since

    def steps_of(self, group: dict[str, Any]) -> int:
        """Since the last merge, or in all."""
        return self.since if group["kind"] == "skew" else self.taken

    def is_due(self) -> bool:
        """Whether the rotations are to be merged now."""
        return self.since >= self._merge_every()

    def has_merged(self) -> bool:
        """Return the same on ranks that have no rotated layer."""
        return self.since != self.taken

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``merging`` merges, once the model has its result."""
        loss = super().step(closure)
        self.since += 1
        return loss

    @torch.no_grad()
    def merge_if_due(self) -> bool:
        """Whether it was."""
        due = self.is_due()
        if due and self.layers:
            super().merge_if_due()
        self.since = 0 if due else self.since
        return due

    def _merge_every(self) -> int:
        return self.options.merge_every

    def state_dict(self) -> dict[str, Any]:
        """One number of steps for all states, as of Megatron's Adam; that since the merge beside.

        ``STATE`` is the same dict in all groups.
        """
        found = super().state_dict()
        for group, saved in zip(self.param_groups, found["param_groups"], strict=True):
            saved[STATE]["since"] = self.since
            for number in saved["params"]:
                if group["kind"] == "skew" and "step" in found["state"][number]:
                    found["state"][number]["step"] = torch.tensor(float(self.taken))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if the states are another optimizer's."""
        shared: dict[str, Any] = next(
            (g[STATE] for g in state_dict["param_groups"] if g.get(STATE)), {}
        )
        if "since" not in shared:
            raise ValueError(
                "the checkpoint's optimizer is not spectral_poet, so it has no steps since a merge;"
                " start the optimizer anew with --no-load-optim"
            )
        super().load_state_dict(state_dict)
        self.since = int(shared["since"])
        for group in self.param_groups:
            for p in group["params"]:
                if group["kind"] == "skew" and "step" in self.state.get(p, {}):
                    self.state[p]["step"] = torch.tensor(float(self.since))


TYPES: dict[str, type[InsideMegatron]] = {}
"""Our optimizers by the name that --optimizer takes."""


def _name(entry: registry.Entry) -> None:
    kind: type[InsideMegatron] = SpectralPOET
    if entry.rule is not None:
        doc = f"``spectral_dist.{entry.title}`` as --optimizer {entry.megatron_name}."
        namespace = {"__doc__": doc, "__module__": __name__}
        kind = type(entry.deepspeed_type, (InsideMegatron, class_of(entry)), namespace)
    TYPES[entry.megatron_name] = kind


registry.add_listener(_name)
