"""Regular expressions that a user gives to override how parameters are treated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


class Patterns:
    """Regular expressions of one option; one that matches no parameter is an error (``check``).

    Args:
        option: its name, for errors.
        patterns: expressions, of which ``re.search`` looks for a match in a parameter's name.

    Attributes:
        used: for each pattern, whether it has matched.

    Raises:
        ValueError: no list of regular expressions.
    """

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

    def find(self, name: str, unique: bool = False) -> str | None:
        """Return the first pattern that matches a name, or None, and mark all that match as used.

        Args:
            name: of a parameter.
            unique: whether it is an error that a second pattern matches.

        Raises:
            ValueError: names the patterns.
        """
        matches = [p for p in self.used if re.search(p, name)]
        if unique and len(matches) > 1:
            raise ValueError(f"{self.option}: {matches} all match {name}; make them narrower")
        for pattern in matches:
            self.used[pattern] = True
        return matches[0] if matches else None

    def check(self, names: Sequence[str]) -> None:
        """Raise a ValueError for a pattern that no parameter's name has matched.

        Args:
            names: of trainable parameters, of which the error shows some.
        """
        for pattern, used in self.used.items():
            if not used:
                raise ValueError(
                    f"{self.option}: {pattern!r} matches no trainable parameter;"
                    f" they are named as in {', '.join(names[:3])}"
                )
