"""What errors about names have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, words: Iterable[str]) -> str:
    """Return '; did you mean X?' if a known name is near, then the list of known names."""
    words = sorted(words)
    lowered = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), lowered, n=1)
    meant = f"; did you mean {lowered[near[0]]!r}?" if near else "."
    return f"{meant} Known: {', '.join(words)}."
