"""torchrun from a process that has imported everything before: a start takes a second, not ten.

The launcher is torch's own, with its own arguments; but its ranks are forked and not executed. As
those that are executed, they share nothing with it but pipes and sockets. With torchrun's own
``--start_method fork`` a finished rank waits on a ``multiprocessing.Event`` of the launcher's, and
setting that waits for ever for a rank that was killed there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

FORK = multiprocessing.get_context("fork")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.preloaded"])
FORKSERVER: Any = forkserver


def preload(wanted: str) -> None:
    """Have the server import for "megatron", whose stand-in for GPUs no other has, or "others"."""
    if os.environ.get("PRELOADED", wanted) != wanted:
        FORKSERVER._forkserver._stop()  # the next one is started anew
    os.environ["PRELOADED"] = wanted


def launch(arguments: Sequence[str], env: Mapping[str, str], folder: Path, printed: Path) -> None:
    """Be torchrun with these arguments."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api

    api.get_subprocess_handler = ForkedRank
    run.main(["--no_python", *arguments])


def rank(arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Be a rank of torchrun's: a script with its arguments, in a process group of its own."""
    os.setpgid(0, 0)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # torchrun's handlers, which an exec would reset
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    from torch.distributed import run

    run.run_script_path(*arguments)


def launcher(
    arguments: Sequence[str], env: Mapping[str, str], folder: Path, printed: Path
) -> Forked:
    """Start torchrun with these arguments."""
    return Forked(SERVER.Process(target=launch, args=(arguments, env, folder, printed)))


class Forked:
    """A process of ``multiprocessing``, with the methods of one of ``subprocess``."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        """Its exit status; None: it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit status; raise subprocess.TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return status


class ForkedRank(SubprocessHandler):
    """How torchrun starts a rank, but for the fork in place of an exec."""

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        started = Forked(FORK.Process(target=rank, args=(args, env)))
        with contextlib.suppress(ProcessLookupError):  # the rank does it as well: close() needs it
            os.setpgid(started.pid, started.pid)
        return started
