"""The torch optimizers that stand inside of Megatron's, in the place of its Adam."""

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
"""The key in every parameter group of a checkpoint of what all groups share."""


class MegatronInnerOptimizer(ShardedOptimizer):
    """The base of our optimizers under Megatron: states and groups are saved in Adam's format.

    Megatron matches saved groups with the optimizer's by a few keys of its own, which may be the
    same in several groups. So options of groups are never loaded (flags set them, as they set
    Adam's), and what has to be loaded is the same in every group.

    Attributes:
        num_steps: steps taken. Counted here, since a rank may have no parameter with a state.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.num_steps = 0
        self._megatron_keys: list[list[str]] = []
        self._is_collective = self._has_adam_moments = False
        super().__init__(groups, **options)

    def saved_identity(self) -> dict[str, Any]:
        """Return the entry of a saved parameter group that says which optimizer it is of."""
        return {STATE: {"optimizer": type(self).__name__}}

    def set_megatron_keys(self, keys: Sequence[Sequence[str]]) -> None:
        """Set which keys of each parameter group Megatron's checkpoints have to contain."""
        self._megatron_keys = [list(names) for names in keys]

    def steps_taken(self) -> int:
        """Return the steps taken, the same on ranks that have no matrix."""
        return self.num_steps

    def steps_of_group(self, group: dict[str, Any]) -> int:
        """Return the step count that the states of a group's parameters have."""
        return self.num_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and count it; see ``ShardedOptimizer.step``."""
        loss = super().step(closure)
        self.num_steps += 1
        return loss

    def prepare(self) -> None:
        """Create the states of all parameters. A collective call, the first time."""
        for group in self.param_groups:
            self.units(group)

    @contextlib.contextmanager
    def collective_state_dict(self) -> Iterator[None]:
        """Allow ``state_dict()`` to communicate, as all ranks call it inside of this block."""
        self._is_collective = True
        try:
            yield
        finally:
            self._is_collective = False

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict as torch's Adam has it: every parameter with momentum and ``step``.

        Momentum that owners alone have is gathered first, which is a collective call.

        Raises:
            ValueError: owners alone have some state, and this is not a call on all ranks.
        """
        units = [
            (group, unit)
            for group in self.param_groups
            for unit in self.units(group)
            if isinstance(unit, MatrixUnit)
        ]
        if any(unit.state for _, unit in units) and not self._is_collective:
            raise ValueError(
                "a matrix's state is on its owner alone, and this checkpoint is written without the"
                " other ranks. Write --ckpt-format torch_dist"
            )
        gathered: dict[Tensor, Tensor] = {}
        for group, unit in units:
            if unit.momentum_at_owner:
                gathered.update(self._gather_momentum(group, unit))
        keys = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        step = torch.tensor(float(self.num_steps))
        state = {i: {"step": step.clone(), **self.state[p]} for p, i in keys.items()}
        for p, momentum in gathered.items():
            state[keys[p]]["exp_avg"] = momentum
        shared: dict[str, Any] = {**self.saved_identity()[STATE], "step": self.num_steps}
        for name in learned_names(self.options_type):
            shared[name] = {}
            for group in self.param_groups:
                shared[name].update(group.get(name) or {})
        groups = []
        for group, names in zip(self.param_groups, self._megatron_keys, strict=True):
            saved = {name: group[name] for name in names}
            members = [keys[p] for p in group["params"]]
            groups.append({**saved, "step": self.num_steps, STATE: shared, "params": members})
        return {"state": state, "param_groups": groups}

    def _gather_momentum(self, group: dict[str, Any], unit: MatrixUnit) -> dict[Tensor, Tensor]:
        """Return the momentum of each of the unit's parameters, gathered from owners.

        Raises:
            ValueError: this is not a call on all ranks.
        """
        if not self._is_collective:
            raise ValueError(
                "a matrix's momentum is on its owner alone, and this checkpoint is written without"
                " the other ranks. Write --ckpt-format torch_dist, with --use-distributed-optimizer"
                " or not, or pass replicate_momentum (--spectral-replicate-momentum)"
            )
        tensors = [group["params"][i] for i in unit.tensors]
        momenta = [torch.zeros_like(p, dtype=self.state[p]["exp_avg"].dtype) for p in tensors]
        owned_runs: dict[Piece, Tensor] = {}
        for index, p in enumerate(tensors):
            owned_runs |= unit.momentum_runs.packed_views(index, self.state[p]["exp_avg"])
        from_owners(unit.exchange, owned_runs, unit.exchange.local_runs.views(momenta))
        return dict(zip(tensors, momenta, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict that any number of ranks has saved; options stay as they are."""
        saved = state_dict["param_groups"]
        shared: dict[str, Any] = next((g[STATE] for g in saved if g.get(STATE)), {})
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": saved_group["params"]}
            for group, saved_group in zip(self.param_groups, saved, strict=True)
        ]
        step = next((g["step"] for g in saved if g.get("step") is not None), 0)
        self.num_steps = int(shared.get("step", step))
        state = {key: dict(value) for key, value in state_dict["state"].items()}
        for value in state.values():
            if "step" not in value:  # TransformerEngine's Adam has it in the group
                value["step"] = torch.tensor(float(self.num_steps))
        super().load_state_dict({"state": state, "param_groups": groups})
        if self._has_adam_moments:
            self._add_adam_moments()
        for name in learned_names(self.options_type):
            for group in self.param_groups:
                table = group.get(name)
                if table:
                    saved_table = shared.get(name, {})
                    group[name] = {key: saved_table.get(key, table[key]) for key in table}

    @contextlib.contextmanager
    def adam_states(self) -> Iterator[None]:
        """Give every state Adam's two moments and no ``step``, inside of this block.

        Megatron's distributed optimizer copies states buffer by buffer, and only such ones. A
        matrix's ``exp_avg_sq`` is zeros, and so is ``exp_avg`` if the rule has no momentum.
        """
        if self._has_adam_moments:  # Megatron's sharded_state_dict calls its load_state_dict
            yield
            return
        self._has_adam_moments = True
        self._add_adam_moments()
        try:
            yield
        finally:
            self._has_adam_moments = False
            has_momentum = not isinstance(self, SpectralOptimizer) or self.has_momentum
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["step"] = torch.tensor(float(self.steps_of_group(group)))
                    if group["kind"] == "matrix":
                        for name in ("exp_avg", "exp_avg_sq")[int(has_momentum) :]:
                            self.state[p].pop(name, None)

    def _add_adam_moments(self) -> None:
        """Remove ``step`` from every state, and add the moments that it does not have, as zeros."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.pop("step", None)
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(p, dtype=torch.float32)


class SpectralPOET(MegatronInnerOptimizer, POET):
    """``spectral_dist.POET`` as --optimizer spectral_poet.

    Attributes:
        num_steps_since_merge: steps since the last merge. Counted here, since a rank may have no
            skew parameter in its shard.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.num_steps_since_merge = 0
        super().__init__(groups, **options)
        self._ramp_asked = True  # by ``poet_merge.merge_after_steps``

    def require_layers(self) -> None:
        """Accept groups without a rotated layer, such as those of a stage's experts."""

    def steps_taken(self) -> int:
        """Return the steps taken, those before the last merge included."""
        return self.num_steps

    def steps_since_merge(self) -> int:
        """Return the steps taken since the last merge, the same on every rank."""
        return self.num_steps_since_merge

    def steps_of_group(self, group: dict[str, Any]) -> int:
        """Return the steps since the last merge for skew parameters, all steps for others."""
        return self.num_steps_since_merge if group["kind"] == "skew" else self.num_steps

    def is_due(self) -> bool:
        """Return whether the rotations have to be merged before the next step."""
        return self.num_steps_since_merge >= self._merge_every()

    def has_merged(self) -> bool:
        """Return whether there was a merge; the same on ranks that have no rotated layer."""
        return self.num_steps_since_merge != self.num_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``poet_merge`` merges after it, once Megatron has updated the model."""
        loss = super().step(closure)
        self.num_steps_since_merge += 1
        return loss

    @torch.no_grad()
    def merge_if_due(self) -> bool:
        """Merge the rotations if that is due, and return whether it was."""
        due = self.is_due()
        if due and self.layers:
            super().merge_if_due()
        self.num_steps_since_merge = 0 if due else self.num_steps_since_merge
        return due

    def _merge_every(self) -> int:
        return self.options.merge_every

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict in Adam's format, with the steps since the last merge in ``STATE``.

        As in Megatron's Adam, all states have the same ``step``. ``STATE`` is the same dict in all
        groups.
        """
        state_dict = super().state_dict()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved[STATE]["since"] = self.num_steps_since_merge
            for key in saved["params"]:
                if group["kind"] == "skew" and "step" in state_dict["state"][key]:
                    state_dict["state"][key]["step"] = torch.tensor(float(self.num_steps))
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer.

        Raises:
            ValueError: it is another optimizer's.
        """
        shared: dict[str, Any] = next(
            (g[STATE] for g in state_dict["param_groups"] if g.get(STATE)), {}
        )
        if "since" not in shared:
            raise ValueError(
                "the checkpoint's optimizer is not spectral_poet, so it has no steps since a merge;"
                " start the optimizer anew with --no-load-optim"
            )
        super().load_state_dict(state_dict)
        self.num_steps_since_merge = int(shared["since"])
        for group in self.param_groups:
            for p in group["params"]:
                if group["kind"] == "skew" and "step" in self.state.get(p, {}):
                    self.state[p]["step"] = torch.tensor(float(self.num_steps_since_merge))


TYPES: dict[str, type[MegatronInnerOptimizer]] = {}
"""The optimizer class of each of our names that --optimizer takes."""


def _add_type(entry: registry.Entry) -> None:
    """Make the class of a registered optimizer, and add it to ``TYPES``."""
    cls: type[MegatronInnerOptimizer] = SpectralPOET
    if entry.rule is not None:
        doc = f"``spectral_dist.{entry.title}`` as --optimizer {entry.megatron_name}."
        namespace = {"__doc__": doc, "__module__": __name__}
        cls = type(entry.deepspeed_type, (MegatronInnerOptimizer, class_of(entry)), namespace)
    TYPES[entry.megatron_name] = cls


registry.add_listener(_add_type)
