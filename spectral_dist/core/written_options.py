"""Options that schedulers and users write into parameter groups during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from spectral_dist.core.agreement import group_lines
from spectral_dist.placement.base import ParamGroup
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import BaseOptions


class WrittenOptions:
    """The options of groups when last checked, so that a step checks only changed ones."""

    def __init__(self) -> None:
        self._lines: dict[int, list[str]] = {}
        self._shaping: dict[int, dict[str, object]] = {}

    def lines(self, group: Mapping[str, object]) -> list[str]:
        """Return the options of a group as it was last checked, a line for each."""
        number = group["id"]
        assert isinstance(number, int)
        return self._lines.get(number, [])

    def keep_shaping(self, base: BaseOptions, group: ParamGroup) -> None:
        """Remember a group's options that determine the shapes of its states.

        They must not change afterwards.

        Args:
            base: the optimizer's options.
            group: whose states are made.
        """
        names = {name for name, spec in specs_of(type(base)).items() if spec.shapes_state}
        shaping = {name: group[name] for name in names & group.keys()}
        self._shaping.setdefault(group["id"], shaping)

    def check(
        self,
        base: BaseOptions,
        group: ParamGroup,
        changed: Callable[[ParamGroup, BaseOptions], None],
    ) -> None:
        """Check a group whose options have changed, and pass them to a callback.

        Args:
            base: the optimizer's options, which the group's override.
            group: that something may have written into.
            changed: called with the group and its options; it may write into the group as well.

        Raises:
            ValueError: a bad value, or a changed option that determines the shapes of states.
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
