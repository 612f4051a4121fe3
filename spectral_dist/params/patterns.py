"""Regular expressions that a user gives to override how parameters are treated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spectral_dist.params.spec import ParamInfo
from spectral_dist.params.splits import Split, per_head


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


@dataclass
class Overrides:
    """What a user says of parameters, beside what their modules say.

    Attributes:
        forced: the patterns of the options matrices, scalars and one_sided, by option.
        splits: the patterns of ``split``.
        split: pattern -> parts.
        per_head: whether q, k and v are cut into their heads.
        has_heads: whether any parameter has been cut so.
    """

    forced: dict[str, Patterns]
    splits: Patterns
    split: Mapping[str, Split]
    per_head: bool = False
    has_heads: bool = field(default=False, init=False)

    @classmethod
    def of_user(
        cls, split: Mapping[str, Split] | None, heads: str | None, **forced: Iterable[str]
    ) -> Overrides:
        """Return the overrides of the options of ``classify``.

        Raises:
            ValueError: a bad value, but for parts of a split, which are checked where it matches.
        """
        if not isinstance(split or {}, Mapping):
            raise ValueError(
                f'split is {split!r}; write pattern and parts, as in {{"qkv": [512, 128, 128]}}'
            )
        if heads not in (None, "auto"):
            raise ValueError(
                f"heads is {heads!r}; write 'auto' for one matrix per attention head, or split for"
                ' rows of your own, as in split={"q_proj": [64, 64]}'
            )
        patterns = {option: Patterns(option, given) for option, given in forced.items()}
        return cls(patterns, Patterns("split", split or {}), split or {}, heads == "auto")

    @property
    def all_patterns(self) -> list[Patterns]:
        """Return the patterns of every option."""
        return [*self.forced.values(), self.splits]

    def matched(self, name: str, info: ParamInfo) -> tuple[str, str] | None:
        """Return the (option, pattern) that overrides what a parameter is by itself, or None.

        Args:
            name: of the parameter.
            info: what it is by itself.

        Raises:
            ValueError: patterns of two options match, or one that asks for a matrix of a vector.
        """
        matches = [
            (o, hit)
            for o, patterns in self.forced.items()
            if (hit := patterns.find(name)) is not None
        ]
        if len(matches) > 1:
            both = " and ".join(f"{option}: {hit!r}" for option, hit in matches)
            raise ValueError(f"{name} matches both {both}; make one of them narrower")
        for option, pattern in matches:
            if option != "scalars" and len(info.shape) < 2:
                what = f"{len(info.shape)}-D"
                raise ValueError(f"{option}: {pattern!r} matches {name}, which is {what}")
        return matches[0] if matches else None

    def parts(self, name: str, info: ParamInfo, pattern: str | None) -> Split | None:
        """Return how a matrix is split; notes in ``has_heads`` whether into its heads.

        Args:
            name: of the parameter.
            info: what it is by itself.
            pattern: of ``split``, that matches it; None: none does.

        Raises:
            ValueError: a part is no whole number of heads.
        """
        if pattern is not None:
            return self.split[pattern]
        if not self.cuts_heads(info):
            return info.split
        self.has_heads = True
        rows = (info.view or info.shape)[-1 if info.transposed else -2]
        return per_head(rows, info.split, info.heads, f"of {name}")

    def cuts_heads(self, info: ParamInfo) -> bool:
        """Return whether a parameter is cut into its heads, unless ``split`` matches it."""
        return self.per_head and any(info.heads)
