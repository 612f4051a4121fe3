"""A run's checkpoint in no framework's format, between those that ``convert`` reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spectral_dist.checkpoint.plain import check_plain

MOMENTS = {"matrix": ("exp_avg",), "scalar": ("exp_avg", "exp_avg_sq")}


@dataclass
class Run:
    """The state of a run: whole tensors on the CPU, by the model's names.

    Attributes:
        model: weights and buffers by name.
        state: {parameter: {"step", "exp_avg", and of AdamW's "exp_avg_sq"}}.
        groups: options under our names, with "kind" and "names"; an option that is missing is left
            to the optimizer.
        extra: plain data, as ``spectral_dist.checkpoint.save`` takes it.
        rule: whose state it is, as "Muon"; None if that is not known.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    rule: str | None = None

    def check(self, where: object) -> Run:
        """Validate the run and return it; groups are normalized through JSON.

        Args:
            where: the checkpoint, for errors.

        Raises:
            ValueError: names the parameter or key that is missing, unknown, or of another shape.
        """
        self.groups = json.loads(json.dumps(self.groups, default=float))
        in_groups: set[str] = set()
        for group in self.groups:
            if group["kind"] not in MOMENTS:
                raise ValueError(
                    f"{where} is POET's, whose rotations no other optimizer goes on with; load it"
                    " with POET, and take plain weights out with spectral_dist.poet.export"
                )
            for name in group["names"]:
                if name in in_groups or name not in self.model:
                    what = "is in two groups" if name in in_groups else "is not in the model"
                    raise ValueError(f"{where}: {name} {what}")
                in_groups.add(name)
                self._check_state(where, name, MOMENTS[group["kind"]])
        for name in sorted(self.state.keys() - in_groups):
            raise ValueError(f"{where}: {name} has a state, but is in no group")
        check_plain(self.extra, str(where))
        return self

    def _check_state(self, where: object, name: str, moments: tuple[str, ...]) -> None:
        """Raise a ValueError if a parameter's state lacks a moment, or has another key or shape."""
        state = self.state.get(name, {})
        for key in sorted({"step", *moments} ^ state.keys()):
            what = f"unknown state {key!r}" if key in state else f"no {key}"
            raise ValueError(f"{where}: {what} of {name}")
        for key in moments:
            if state[key].shape != self.model[name].shape:
                shapes = [tuple(t.shape) for t in (state[key], self.model[name])]
                raise ValueError(f"{where}: {name} is {shapes[1]}, but its {key} is {shapes[0]}")

    def names(self, kind: str) -> list[str]:
        """Return the parameters of one kind, 'matrix' or 'scalar', in the order of groups."""
        return [name for group in self.groups if group["kind"] == kind for name in group["names"]]

    def has_moments(self, name: str) -> bool:
        """Return whether any of a parameter's moments is not zero.

        All are zero if it has had no gradient yet.
        """
        return any(
            bool(self.state[name][k].any()) for k in MOMENTS["scalar"] if k in self.state[name]
        )

    def steps(self, kind: str, names: Iterable[str], where: object) -> float:
        """Return the number of steps of parameters, for formats that count them together.

        Args:
            kind: of the parameters.
            names: of the parameters.
            where: the format or checkpoint, for errors.

        Raises:
            ValueError: AdamW has taken more steps on one than on another.
        """
        counts = {name: float(self.state[name]["step"]) for name in names}
        used = {name: count for name, count in counts.items() if self.has_moments(name)}
        if kind == "scalar" and len(set(used.values())) > 1:
            few, many = (pick(used, key=used.__getitem__) for pick in (min, max))
            raise ValueError(
                f"{where} counts steps once for all of these, but AdamW has taken {used[few]:g} on"
                f" {few} and {used[many]:g} on {many}"
            )
        return max((used or counts).values(), default=0.0)


def with_lr_ratios(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write one lr into all groups, and each group's own as its ratio to that one; return them.

    The one lr is that of the first group that is not AdamW's. Groups that have ratios already are
    returned as they are.
    """
    if any(group.get("lr_ratio", 1.0) != 1.0 for group in groups):
        return groups
    base = min(groups, key=lambda g: g.get("kind") == "scalar")["lr"] if groups else 0.0
    for group in groups:
        group["lr_ratio"] = ratio = group["lr"] / base if base else 1.0
        if base:
            group["lr"] = base
            if "initial_lr" in group and ratio:
                group["initial_lr"] /= ratio
    return groups


def no_place(folder: Path) -> str:
    """Return the error for a checkpoint with matrix state, which no other format can hold."""
    return (
        f"{folder} holds matrix state (SUMO's bases and moments), for which no other format has a"
        " place; load it with the optimizer that saved it, on any number of ranks"
    )
