"""Where docs/troubleshooting.md explains an error of ours, and how the error says so."""

from __future__ import annotations

import dis
import re
from contextlib import ContextDecorator

from spectral_dist._error_help import (
    checkpoints,
    frameworks,
    general,
    launcher,
    model,
    trainers,
    training,
)

PAGE = "docs/troubleshooting.md"
"""The page that has a heading for every text; its anchors are the keys of ``TEXTS``."""
PACKAGE = __name__.partition(".")[0]
TEXTS: dict[str, tuple[str, ...]] = {
    **trainers.TEXTS,
    **model.TEXTS,
    **training.TEXTS,
    **checkpoints.TEXTS,
    **frameworks.TEXTS,
    **launcher.TEXTS,
    **general.TEXTS,
}
"""Anchor -> regular expressions of the texts that it explains; the first that fits counts."""
ON_RANK = re.compile(r" \(on rank \d+( of \d+)?\)$")
"""What an error adds that another rank had."""


def anchor_of(text: str) -> str | None:
    """Return the anchor on ``PAGE`` of an error's text; None if it is no text of ours."""
    text = ON_RANK.sub("", text)
    for anchor, patterns in TEXTS.items():
        if any(re.search(pattern, text, re.DOTALL) for pattern in patterns):
            return anchor
    return None


def note_of(text: str) -> str | None:
    """Return the line that says where an error's text is explained; None if it is not ours."""
    anchor = anchor_of(text)
    return None if anchor is None else f"{PACKAGE}: {PAGE}#{anchor}"


def with_page(text: str) -> str:
    """Return a text followed by where it is explained, for a program that prints one line."""
    anchor = anchor_of(text)
    return text if anchor is None else f"{text} ({PAGE}#{anchor})"


class _Explained(ContextDecorator):
    """Adds a note with its anchor to an error that passes, if this package has raised it.

    The error stays the same object with the same text. An error of torch, or of a function that the
    user has passed, gets no note, whatever it says.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and _is_raised_here(error):
            note = note_of(str(error))
            if note is not None and note not in getattr(error, "__notes__", ()):
                error.add_note(note)


explained = _Explained()
"""``@explained`` above a public function, or ``with explained:`` in it; it has no state."""


def _is_raised_here(error: Exception) -> bool:
    """Return whether a raise statement in a module of this package has raised an error.

    What torch's own code raises in a function that such a module has called is not.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    instruction = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    return module.partition(".")[0] == PACKAGE and instruction == "RAISE_VARARGS"
