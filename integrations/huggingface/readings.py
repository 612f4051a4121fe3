"""What a monitor reads of matrices, in the logs of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from spectral_dist.monitor import Monitor, Report

PRINTERS = (PrinterCallback, ProgressCallback)
"""Callbacks that print all that is logged, where a few numbers for each matrix are too many."""


class Readings:
    """The latest reading of each matrix, as QUANTITY/MATRIX, since the Trainer's last log.

    The Trainer hands one dict to all callbacks in turn, its reporters (TensorBoard, W&B) before the
    user's. So one callback of ours adds the readings before all others, and one takes them out
    again before those that print.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def keep(self, step: int, report: Report) -> None:
        """Keep a report: a sink for ``Monitor``."""
        for quantity, by_matrix in report.items():
            self.values.update({f"{quantity}/{matrix}": v for matrix, v in by_matrix.items()})

    def log(self, monitor: Monitor, handler: CallbackHandler) -> None:
        """Let what a monitor reports be logged by a Trainer's callbacks, from now on."""
        if self.keep not in monitor.sinks:
            monitor.sinks.append(self.keep)
        others = [c for c in handler.callbacks if not isinstance(c, _Add | _Remove)]
        printers = [c for c in others if isinstance(c, PRINTERS)]
        others = [c for c in others if not isinstance(c, PRINTERS)]
        # another list, because the handler may be going through the old one
        handler.callbacks = [_Add(self), *others, _Remove(self), *printers]


class _Add(TrainerCallback):  # type: ignore[misc]
    """Adds readings to what is logged."""

    def __init__(self, readings: Readings) -> None:
        self.readings = readings

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **others: Any
    ) -> None:
        """Add the readings."""
        logs.update(self.readings.values)


class _Remove(TrainerCallback):  # type: ignore[misc]
    """Takes readings out of what is logged, and forgets them."""

    def __init__(self, readings: Readings) -> None:
        self.readings = readings

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **others: Any
    ) -> None:
        """Take the readings out."""
        for name in self.readings.values:
            logs.pop(name, None)
        self.readings.values.clear()
