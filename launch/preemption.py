"""Signals that announce the end of a job: a checkpoint first, within a time that is given."""

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
"""Exit status (EX_TEMPFAIL): ended by a signal, all steps in a checkpoint, --resume goes on."""
AGAIN = 1.0
"""Seconds in which a second signal is the first one, which a launcher has passed on as well."""


class Preemption:
    """Notices the first of SIGNALS while it is entered; ``requested`` is what ranks agree on.

    A thread listens, and not the handler: Python's handlers wait for the main thread, which may be
    in a collective call that never returns. The thread ends the process, with 128 + the signal's
    number and without a checkpoint, when ``grace`` seconds are over, or at a second signal.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received: signal.Signals | None = None
        self._over = False
        self._former: dict[signal.Signals, Any] = {}
        os.register_at_fork(
            before=self._hold, after_in_parent=self._release, after_in_child=self._forget
        )

    @property
    def requested(self) -> bool:
        """Whether this process was asked to end."""
        return self.received is not None

    def over(self) -> None:
        """Have no signal end this process from now on: all is saved, and it ends by itself."""
        self._over = True

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._former_descriptor = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or after &
                self._former[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
        signal.set_wakeup_fd(self._former_descriptor)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def _handle(self, number: int, frame: object) -> None:
        """In the main thread, which sees it before its next step of Python."""
        self.received = self.received or signal.Signals(number)

    def _hold(self) -> None:
        """Let signals wait while a child is forked, until it is known whose they are."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._former)

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _forget(self) -> None:
        """In a forked child, as some write checkpoints: what it is sent is for it alone."""
        for number in self._former:
            signal.signal(number, signal.SIG_DFL)
        if self._former:
            signal.set_wakeup_fd(-1)  # which is the parent's, too
        self._release()

    def _listen(self) -> None:
        deadline: float | None = None
        while True:
            now = time.monotonic()
            self._reader.settimeout(None if deadline is None else max(0.001, deadline - now))
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                if not self._over:
                    self._end(f"no checkpoint within --grace {self.grace:g} seconds after")
                deadline = None
                continue
            if not numbers:
                return
            for number in numbers:
                if number in self._former:  # others that somebody handles are written there, too
                    deadline = self._take(signal.Signals(number), deadline)

    def _take(self, received: signal.Signals, deadline: float | None) -> float:
        """Note a signal; return when its time is over."""
        now = time.monotonic()
        if deadline is None:
            self.received = self.received or received
            return now + self.grace
        if now - (deadline - self.grace) >= AGAIN and not self._over:
            self._end(f"{received.name} after")
        return deadline

    def _end(self, why: str) -> NoReturn:
        assert self.received is not None
        text = f"pretrain: {why} {self.received.name}: ended without a checkpoint of these steps\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(128 + self.received)
