"""Regular expressions that a user gives to override how parameters are treated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


class Patterns:
    """Regular expressions by option; an expression that no parameter answers to is an error."""

    def __init__(self, option: str, patterns: Iterable[str]) -> None:
        self.option = option
        if not isinstance(patterns, Iterable):
            raise ValueError(f"{option} is {patterns!r}; write a list of regular expressions")
        self.used = dict.fromkeys([patterns] if isinstance(patterns, str) else patterns, False)
        for pattern in self.used:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{option}: {pattern!r} is no regular expression: {error}"
                ) from None

    def find(self, name: str, alone: bool = False) -> str | None:
        """The first pattern that matches, or None. ``alone``: that a second does is an error."""
        matches = [p for p in self.used if re.search(p, name)]
        if alone and len(matches) > 1:
            raise ValueError(f"{self.option}: {matches} all match {name}; make them narrower")
        for pattern in matches:
            self.used[pattern] = True
        return matches[0] if matches else None

    def check(self, names: Sequence[str]) -> None:
        """Raise if a pattern has not been used."""
        for pattern, used in self.used.items():
            if not used:
                raise ValueError(
                    f"{self.option}: {pattern!r} matches no trainable parameter;"
                    f" they are named as in {', '.join(names[:3])}"
                )
