"""Show how far a run is: a bar on a terminal, a line a minute in a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm  # type: ignore[import-untyped]

LINE_SECONDS = 60.0
"""Between two lines where stderr is no terminal: a bar there would repeat itself in every line."""


class Progress:
    """Progress of one rank's run; nothing is shown on ranks other than the first."""

    def __init__(self, done: int, total: int, first: bool) -> None:
        """Start at step ``done`` of ``total``."""
        self.done, self.total = done, total
        self.lines = first and not sys.stderr.isatty()
        self.shown_at = time.monotonic()
        self.bar = tqdm(
            total=total, initial=done, disable=not first or self.lines, unit="step", file=sys.stderr
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def advance(self, record: dict[str, Any], last: bool) -> None:
        """Count a step and show its numbers, in a file at most once a minute and at the end."""
        self.done += 1
        loss, bits = f"{record['loss']:.3f}", f"{record['bits_per_byte']:.3f}"
        speed = f"{record['tokens_per_second']:.0f}"
        self.bar.update()
        self.bar.set_postfix(loss=loss, bpb=bits, tok_s=speed)
        if self.lines and (last or time.monotonic() - self.shown_at >= LINE_SECONDS):
            self.shown_at = time.monotonic()
            sys.stderr.write(
                f"pretrain: step {self.done} of {self.total}: loss {loss}, {bits} bits per byte,"
                f" {speed} tokens/s\n"
            )
