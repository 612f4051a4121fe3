"""Parts of the slow tests, so that each is run now and then although all of them take too long."""

from __future__ import annotations

import hashlib
from collections.abc import Collection


def parse(text: str) -> tuple[int, int]:
    """Return (part, parts) of "3/7".

    Raises:
        ValueError: it is no such text, or the part is not in 1..parts.
    """
    part, slash, parts = text.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise ValueError(f"--slow-part {text!r}: write K/N with 1 <= K <= N, as in 3/7")


def select(node_ids: Collection[str], part: int, parts: int) -> set[str]:
    """Return those of ``node_ids`` that belong to ``part`` (from 1) of ``parts``.

    Parts differ by one test at most in their number. They are cut from the order of the SHA-256 of
    the ids, so that a test that comes or goes moves few others to another part, and the costly
    cases of one file are spread over all parts.
    """

    def digest(node_id: str) -> tuple[str, str]:
        return hashlib.sha256(node_id.encode()).hexdigest(), node_id

    ordered = sorted(node_ids, key=digest)
    return set(ordered[len(ordered) * (part - 1) // parts : len(ordered) * part // parts])
