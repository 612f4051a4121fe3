"""torchrun from a process that has imported everything before: a start takes a second, not ten.

The launcher is torch's own, with its own arguments; but its ranks are forked and not executed.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

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

    run.main(["--run_path", "--start_method", "fork", *arguments])


class Forked:
    """Such a process, with the methods of one of ``subprocess``."""

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, printed: Path
    ) -> None:
        self._process = SERVER.Process(target=launch, args=(arguments, env, folder, printed))
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
            raise subprocess.TimeoutExpired("torchrun", timeout)
        return status
