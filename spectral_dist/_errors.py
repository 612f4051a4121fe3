"""What errors about names have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CLOSE = 0.85
"""As SequenceMatcher counts; a slip of a letter in a name of seven leaves so much."""


def nearest(word: str, words: Iterable[str], close: float = CLOSE) -> str | None:
    """Return the known name that a word is a slip of, or None."""
    lowered = {known.lower(): known for known in sorted(words)}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=close)
    return lowered[near[0]] if near else None


def suggest(word: str, words: Iterable[str]) -> str:
    """Return '; did you mean X?' if a known name is near, then the list of known names."""
    words = sorted(words)
    near = nearest(word, words, close=0.6)
    meant = f"; did you mean {near!r}?" if near else "."
    return f"{meant} Known: {', '.join(words)}."
