"""Handle the signals that announce a job's end: save a checkpoint first, within a limited time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PREEMPTED = 75
"""Exit status (EX_TEMPFAIL) of a run that a signal ended with all steps saved; --resume goes on."""
DUPLICATE_SECONDS = 1.0
"""Seconds within which a second signal counts as the first, passed on by a launcher as well."""


class Preemption:
    """A context in which the first of SIGNALS sets ``requested``, on which the ranks then agree.

    A thread listens, and not the handler: Python's handlers wait for the main thread, which may be
    in a collective call that never returns. The thread ends the process, with 128 + the signal's
    number and without a checkpoint, when ``grace`` seconds are over, or at a second signal.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received: signal.Signals | None = None
        self._disarmed = False
        self._former_handlers: dict[signal.Signals, Any] = {}
        os.register_at_fork(
            before=self._block_signals,
            after_in_parent=self._unblock_signals,
            after_in_child=self._reset_in_child,
        )

    @property
    def requested(self) -> bool:
        """Return whether this process was asked to end."""
        return self.received is not None

    def disarm(self) -> None:
        """Let no signal end this process from now on: all is saved, and it ends by itself."""
        self._disarmed = True

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._former_descriptor = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup, or after &
                self._former_handlers[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}
        signal.set_wakeup_fd(self._former_descriptor)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def _handle(self, number: int, frame: object) -> None:
        """Note a signal in the main thread, which calls this before its next Python instruction."""
        self.received = self.received or signal.Signals(number)

    def _block_signals(self) -> None:
        """Block signals while a child is forked, until parent and child can tell whose they are."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._former_handlers)

    def _unblock_signals(self) -> None:
        """Restore the signal mask from before the fork."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _reset_in_child(self) -> None:
        """Restore default handlers in a forked child, so that its signals concern it alone.

        Some libraries fork to write checkpoints.
        """
        for number in self._former_handlers:
            signal.signal(number, signal.SIG_DFL)
        if self._former_handlers:
            signal.set_wakeup_fd(-1)  # the descriptor is shared with the parent
        self._unblock_signals()

    def _listen(self) -> None:
        """Wait for signals in the thread, and end the process when its time is over."""
        deadline: float | None = None
        while True:
            now = time.monotonic()
            self._reader.settimeout(None if deadline is None else max(0.001, deadline - now))
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                if not self._disarmed:
                    self._end(f"no checkpoint within --grace {self.grace:g} seconds after")
                deadline = None
                continue
            if not numbers:
                return
            for number in numbers:
                if number in self._former_handlers:  # the descriptor gets all handled signals
                    deadline = self._note_signal(signal.Signals(number), deadline)

    def _note_signal(self, received: signal.Signals, deadline: float | None) -> float:
        """Note a signal, and return the time at which the process has to end."""
        now = time.monotonic()
        if deadline is None:
            self.received = self.received or received
            return now + self.grace
        if now - (deadline - self.grace) >= DUPLICATE_SECONDS and not self._disarmed:
            self._end(f"{received.name} after")
        return deadline

    def _end(self, why: str) -> NoReturn:
        """End the process at once, with a message."""
        assert self.received is not None
        text = f"pretrain: {why} {self.received.name}: ended without a checkpoint of these steps\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(128 + self.received)
