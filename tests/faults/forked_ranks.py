"""Ranks of launch/pretrain.py by the hundred: forked from a process that has imported everything.

    with ForkedRanks(job) as ranks:
        endings = ranks.run(2, arguments, 60, folder)

A rank is a fresh process, so that no run can change the next one; what it does not do again is the
4 seconds of imports. ``python -m tests.faults.forked_ranks [VERSION OF MEGATRON-CORE]`` is the
process that forks: it reads a line of JSON for each run and answers with one.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from tests.launch.jobs import ROOT, LaunchedJob

IMPORTED = (
    *("deepspeed", "matplotlib.pyplot", "tensorboard.compat.tensorflow_stub", "torch._dynamo"),
    *("torch.utils.tensorboard", "transformers.models.llama.modeling_llama"),
    *("spectral_dist.integrations.deepspeed", "spectral_dist.launch.corpus"),
    *("spectral_dist.launch.engines.deepspeed", "spectral_dist.launch.engines.torch"),
    *("spectral_dist.launch.shipped", "spectral_dist.launch.trainer"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.backends.backend_agg"),
)
"""What a rank of any engine imports, some of it late."""
GRACE = 20.0
"""Seconds that the other ranks get once one has ended with an error: they may wait for it."""
HUNG = "hung"
SAMPLE = 4
"""Tokens of the sample at the end, which is more than half of a short run's time."""


@dataclass(frozen=True)
class Ending:
    """How a rank ended: its exit status, minus the signal's number, or HUNG; what it printed."""

    status: int | str
    printed: str


class ForkedRanks:
    """The process that forks, started when it is first needed, and again if it has died."""

    def __init__(self, job: LaunchedJob, megatron: str = "") -> None:
        """``megatron``: a version of megatron-core, which all runs then have on the CPU."""
        self.job, self.megatron = job, megatron
        self.server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process."""
        if self.server is not None:
            self.server.kill()
            self.server.communicate()
            self.server = None

    def _started(self) -> subprocess.Popen[str]:
        if self.server is None or self.server.poll() is not None:
            command = [sys.executable, "-W", "ignore", "-m", __name__, self.megatron]
            self.server = subprocess.Popen(
                command,
                env=self.job.env,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self.server

    def run(self, ranks: int, arguments: Sequence[str], limit: float, folder: Path) -> list[Ending]:
        """Run pretrain on some ranks in a folder; each rank's ending, after ``limit`` s at most."""
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        task = {"ranks": ranks, "arguments": list(arguments), "limit": limit}
        server.stdin.write(json.dumps({**task, "folder": str(folder)}) + "\n")
        server.stdin.flush()
        with selectors.DefaultSelector() as waiting:
            waiting.register(server.stdout, selectors.EVENT_READ)
            answered = waiting.select(limit + 120)
        line = server.stdout.readline() if answered else ""
        if not line:
            self.end()
            raise AssertionError(f"the process that forks ranks has died in {arguments}")
        return [Ending(**each) for each in json.loads(line)]


def _serve(megatron: str) -> None:
    """Answer each line of JSON, until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(ImportError):  # of deepspeed
        from spectral_dist.launch.engines.deepspeed import prepare_deepspeed

        prepare_deepspeed()
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if megatron:
        from spectral_dist.launch import megatron_config
        from tests.support import megatron_cpu

        megatron_cpu.install(megatron)
        megatron_config.prepare = lambda: None
        importlib.import_module("spectral_dist.launch.engines.megatron")
    from spectral_dist.launch.trainer import Trainer

    sample: Any = Trainer.sample.__wrapped__  # type: ignore[attr-defined]
    sample.__defaults__ = (SAMPLE, *sample.__defaults__[1:])
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads, which a fork would lose"
    for line in sys.stdin:
        out.write(json.dumps(_run(**json.loads(line))) + "\n")
        out.flush()


def _run(ranks: int, arguments: list[str], limit: float, folder: str) -> list[dict[str, Any]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
    running: dict[int, int] = {}
    for rank, log in enumerate(logs):
        log.write_bytes(b"")
        pid = os.fork()
        if pid == 0:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
            _become_rank(arguments, place if ranks > 1 else {}, log, folder, limit)
        running[pid] = rank
    statuses = _wait(running, limit)
    printed = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    return [{"status": statuses[r], "printed": printed[r]} for r in range(ranks)]


def _wait(running: dict[int, int], limit: float) -> dict[int, int | str]:
    """The ending of each rank, by rank; those that do not end are killed."""
    statuses: dict[int, int | str] = {}
    deadline = time.monotonic() + limit
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                statuses[running.pop(pid)] = code
                if code:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for pid, rank in running.items():
                _kill_group(pid)
                os.waitpid(pid, 0)
                statuses[rank] = HUNG
            break
        time.sleep(0.005)
    return statuses


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _become_rank(
    arguments: list[str], environment: dict[str, str], log: Path, folder: str, limit: float
) -> NoReturn:
    """Be a process that was started as pretrain.py with these arguments, and end as it would."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.dump_traceback_later(max(1.0, min(limit, GRACE) - 2))  # where it hangs
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = ["pretrain.py", *arguments]
        from spectral_dist.launch import pretrain

        try:
            pretrain.app()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
