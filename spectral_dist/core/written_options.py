"""Options of parameter groups, which schedulers and people write into while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from spectral_dist.core.agreement import group_lines
from spectral_dist.placement.base import ParamGroup
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import BaseOptions


class WrittenOptions:
    """What groups carried when they were last checked; a step looks only at what differs."""

    def __init__(self) -> None:
        self._lines: dict[int, list[str]] = {}
        self._shaping: dict[int, dict[str, object]] = {}

    def lines(self, group: Mapping[str, object]) -> list[str]:
        """Return the options of a group as it was last checked, a line for each."""
        number = group["id"]
        assert isinstance(number, int)
        return self._lines.get(number, [])

    def keep_shaping(self, base: BaseOptions, group: ParamGroup) -> None:
        """Note the options that the group's states are made with, of which no other will do."""
        names = {name for name, spec in specs_of(type(base)).items() if spec.shapes_state}
        here = {name: group[name] for name in names & group.keys()}
        self._shaping.setdefault(group["id"], here)

    def check(
        self,
        base: BaseOptions,
        group: ParamGroup,
        changed: Callable[[ParamGroup, BaseOptions], None],
    ) -> None:
        """Check a group that carries other options than before, and hand them to ``changed``.

        Args:
            base: the optimizer's options, in which the group's take the place of their own.
            group: that something may have written into.
            changed: is called with the group and its options; it may write into the group as well.

        Raises:
            ValueError: a bad value, or another one of an option that shaped the states.
        """
        if self._lines.get(group["id"]) == group_lines(type(base), group):
            return
        names = type(base).names(group["kind"]) & group.keys()
        options = replace(base, **{name: group[name] for name in names})
        options.check("a parameter group")
        for name, value in self._shaping.get(group["id"], {}).items():
            if group[name] != value:
                raise ValueError(
                    f"a parameter group: {name} is {group[name]!r}, but its states were made with"
                    f" {value!r}; build a new optimizer for another {name}"
                )
        changed(group, options)
        self._lines[group["id"]] = group_lines(type(base), group)
