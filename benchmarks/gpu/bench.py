"""What all parts share: where they run, how long they may, and where their rows go."""

from __future__ import annotations

import json
import math
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part: its letter, name, share of the time, and what fills in its rows."""

    letter: str
    title: str
    seconds: float
    run: Callable[[Bench], None]


@dataclass
class Result:
    """Rows of a part, and what went wrong."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0


class Bench:
    """The device, the size, the deadline of the part that runs, and all results so far.

    Args:
        device: where to measure.
        tiny: sizes that a CPU does in seconds.
        output: the JSON file, written after each row; None keeps nothing.
    """

    def __init__(self, device: torch.device, tiny: bool, output: Path | None = None) -> None:
        self.device, self.tiny, self.output = device, tiny, output
        self.results: dict[str, Result] = {}
        self.deadline = math.inf
        self.measured: dict[str, float] = {}
        """what later parts need of earlier ones, by name"""
        self.curves: dict[str, list[float]] = {}
        """losses of each training, step by step"""
        self.scale = 1.0
        self._part = ""

    def go_on(self) -> None:
        """Take over what the file has of the parts before, which another process has measured."""
        if self.output is None or not self.output.is_file():
            return
        content = json.loads(self.output.read_text())
        self.results = {letter: Result(**part) for letter, part in content["parts"].items()}
        self.curves, self.measured = content["curves"], content["measured"]

    def works(self) -> bool:
        """Return whether the device still does: after an illegal access it does nothing more."""
        try:
            if self.cuda:
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    @property
    def cuda(self) -> bool:
        """Return whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """Return bfloat16."""
        return torch.bfloat16

    def left(self) -> float:
        """Return the seconds that the part has left."""
        return self.deadline - time.monotonic()

    def has_time(self, what: str, needed: float = 1.0) -> bool:
        """Return whether there is time for a row; if not, note what is left out."""
        if self.left() >= needed:
            return True
        self.note(f"left out, no time: {what}")
        return False

    def add(self, row: Row) -> None:
        """Add a row to the part that runs, and write the file."""
        self.results[self._part].rows.append(row)
        self.write()

    def note(self, text: str) -> None:
        """Add a remark to the part that runs."""
        self.results[self._part].notes.append(text)

    @contextmanager
    def attempt(self, row: Row) -> Iterator[Row]:
        """Give a row to fill in, and add it; an error goes into it, and the part goes on."""
        try:
            yield row
        except TimeoutError:
            raise
        except Exception as error:
            row["error"] = one_line(error)
            row["traceback"] = traceback.format_exc()
        self.add(row)
        self.free()

    def free(self) -> None:
        """Give back what the allocator keeps."""
        if self.cuda and self.works():
            torch.cuda.empty_cache()

    def run(self, part: Part, scale: float, end: float = math.inf) -> None:
        """Run a part within its time, and keep its error, if it has one.

        Args:
            part: what to run.
            scale: of all times.
            end: when everything is to have ended, by time.monotonic().
        """
        self._part = part.letter
        result = self.results[part.letter] = Result(part.title)
        start = time.monotonic()
        budget = min(part.seconds * scale, end - start)
        self.scale, self.deadline = scale, start + budget
        try:
            with alarm(max(1.0, min(1.3 * budget + 15, end - start + 15))):
                part.run(self)
        except Exception as error:  # the other parts are worth having without this one
            result.error, result.traceback = one_line(error), traceback.format_exc()
        result.seconds = round(time.monotonic() - start, 2)
        self.free()
        self.write()

    def header(self) -> dict[str, Any]:
        """Return what was measured on."""
        names: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
        names["device"] = (
            torch.cuda.get_device_name(self.device) if self.cuda else f"cpu, {platform.machine()}"
        )
        names["cuda"] = torch.version.cuda
        names["tiny"] = self.tiny
        return names

    def write(self) -> None:
        """Write the JSON file anew, whole at any time."""
        if self.output is None:
            return
        parts = {letter: vars(result) for letter, result in self.results.items()}
        content = {**self.header(), "parts": parts, "curves": self.curves}
        content["measured"] = self.measured
        text = json.dumps(content, indent=1, default=str)
        part_file = self.output.with_suffix(".part")
        part_file.write_text(text)
        part_file.replace(self.output)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in what hangs longer than that."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: Exception) -> str:
    """Return an error's kind and first words, fit for a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as markdown, with the columns of all of them."""
    hidden = ("traceback", "lines")
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in hidden))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
