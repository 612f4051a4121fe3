"""Real torch.distributed ranks for tests: pools of processes that stay alive between tests."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import queue
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.multiprocessing as mp

TIMEOUT = 240.0
GRACE = 20.0
"""Seconds that the others get once a rank has raised: they may wait for it."""


def busy() -> float:
    """Return how many times as long all takes as on an idle machine, 1 to 10.

    Timeouts are to end what hangs, and not what waits for a core: where sixty processes share two
    of them, the imports of ranks alone have taken longer than ``TIMEOUT``.
    """
    return min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 10.0)


class RankError(AssertionError):
    """Ranks did not do what they should; the message holds each rank's traceback."""


class Failure(NamedTuple):
    """What a rank raised, or how it ended."""

    text: str
    """of one line: type and message"""
    traceback: str


def _worker(rank: int, world: int, port: int, todo: Any, done: Any, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setpgid(0, 0)  # with what the rank starts itself, as Megatron's checkpoints do
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while True:
        module, name, args, kwargs = todo.get()
        try:
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            done.put((rank, result, None))
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            done.put((rank, None, Failure(text, traceback.format_exc())))


def end_with_children(process: Any) -> None:
    """Kill a rank and all that it has started, which would live on."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def sum_over_ranks(module: str) -> tuple[float, float]:
    """Return a sum over the ranks of the default group and what it must be; import ``module``."""
    import torch
    import torch.distributed as dist

    importlib.import_module(module)
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((3,), 2.0**rank)
    dist.all_reduce(numbers)
    return float(numbers.mean()), 2.0**world - 1


class Pool:
    """``world`` ranks that run one function at a time."""

    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.todo = [context.Queue() for _ in range(world)]
        self.done = context.Queue()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.logs = [Path(self.folder.name, f"rank{r}") for r in range(world)]
        self.ranks = [
            context.Process(
                target=_worker, args=(r, world, port, self.todo[r], self.done, str(self.logs[r])),
                daemon=True,
            )
            for r in range(world)
        ]  # fmt: skip
        # read when a child imports torch; DeepSpeed's own Muon would be compiled for 88 s
        os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
        for process in self.ranks:
            process.start()

    def answers(
        self, function: tuple[str, str], args: Any, kwargs: Any, limit: float, grace: float
    ) -> tuple[dict[int, Any], dict[int, Failure], set[int]]:
        """Run a function and return results by rank, failures by rank, and ranks still in it.

        It waits ``limit`` seconds, but no more than ``grace`` once a rank has failed; longer on a
        machine that is ``busy``.
        """
        limit, grace = limit * busy(), grace * busy()
        for todo in self.todo:
            todo.put((*function, args, kwargs))
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        silent = set(range(len(self.ranks)))
        deadline = time.monotonic() + limit
        while silent:
            wait = max(0.0, min(0.5, deadline - time.monotonic()))
            try:
                rank, result, failure = self.done.get(timeout=wait)
                if failure is None:
                    results[rank] = result
                else:
                    failures[rank] = failure
            except queue.Empty:
                for rank in silent:
                    code = self.ranks[rank].exitcode
                    if code is not None:
                        text = f"died with exit code {code}"
                        failures[rank] = Failure(text, text)
                if time.monotonic() >= deadline:
                    break
            finally:
                silent -= results.keys() | failures.keys()
            if failures:
                deadline = min(deadline, time.monotonic() + grace)
        return results, failures, silent

    def run(self, module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return each rank's result; on any error end the ranks, whose group may be out of step.

        Raises:
            RankError: a rank raised, died or did not answer.
        """
        results, failures, silent = self.answers((module, name), args, kwargs, TIMEOUT, GRACE)
        if len(results) < len(self.ranks):
            self.fail("", results, failures, silent)
        return [results[r] for r in range(len(self.ranks))]

    def expect_errors(
        self, module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], within: float
    ) -> list[str]:
        """Return what each rank raised; see ``run_expecting_errors``."""
        check = (__name__, sum_over_ranks.__name__)
        # so that neither the start of the ranks nor what they import counts
        self.run(*check, (module,), {})
        results, failures, silent = self.answers((module, name), args, kwargs, within, within)
        died = [rank for rank, process in enumerate(self.ranks) if process.exitcode is not None]
        if len(failures) < len(self.ranks) or died:
            self.fail(f"not every rank raised within {within} s", results, failures, silent)
        sums, after, silent = self.answers(check, (module,), {}, within, within)
        if len(sums) < len(self.ranks) or any(got != right for got, right in sums.values()):
            self.fail("after their errors the ranks' group is broken", sums, after, silent)
        return [failures[r].text for r in range(len(self.ranks))]

    def fail(
        self, what: str, results: dict[int, Any], failures: dict[int, Failure], silent: set[int]
    ) -> None:
        """End the ranks and raise RankError with what each of them did."""
        told = {rank: f"returned {result!r:.200}" for rank, result in results.items()}
        told |= {rank: failure.traceback for rank, failure in failures.items()}
        told |= dict.fromkeys(silent, "no answer before the timeout (a hang?)")
        if not what:  # those that did well are of no interest
            told = {rank: text for rank, text in told.items() if rank not in results}
        self.kill()
        lines = [what] if what else []
        raise RankError("\n".join(lines + [f"--- rank {r}:\n{e}" for r, e in sorted(told.items())]))

    def end(self) -> None:
        """End the ranks; the next call of their kind starts others."""
        for process in self.ranks:
            end_with_children(process)
        for process in self.ranks:
            process.join(10)
        for key in [k for k, pool in POOLS.items() if pool is self]:
            del POOLS[key]
        self.folder.cleanup()

    def kill(self) -> None:
        """End the ranks and show the end of what they printed."""
        printed = [log.read_text(errors="replace")[-2000:] for log in self.logs if log.exists()]
        self.end()
        sys.stderr.write("".join(printed))


POOLS: dict[tuple[int, str], Pool] = {}


@atexit.register
def _close() -> None:
    for pool in list(POOLS.values()):
        pool.end()


def _pool(world: int, name: str) -> Pool:
    if (world, name) not in POOLS:
        POOLS[world, name] = Pool(world)
    return POOLS[world, name]


def run(
    world: int, function: Callable[..., Any], *args: Any, pool: str = "", **kwargs: Any
) -> list[Any]:
    """``function(*args)`` on ``world`` ranks of a default gloo group; each rank's result.

    The function must be importable, and is to be called by all ranks alike. Raises RankError with
    every rank's traceback; a rank that raises while others wait never hangs the test. Calls of
    different ``pool``s have different processes, so that what one imports does not reach another.
    After an error the processes are ended, since their group may be out of step: a test of errors
    that ranks raise together is faster with ``run_expecting_errors``.
    """
    return _pool(world, pool).run(function.__module__, function.__qualname__, args, kwargs)


def run_expecting_errors(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    within: float = 10.0,
    pool: str = "",
    **kwargs: Any,
) -> list[str]:
    """Assert that ``function(*args)`` raises on every rank, and that the ranks stay usable.

    Args:
        world: Number of ranks.
        function: As ``run`` takes it.
        args: Its arguments.
        within: Seconds in which every rank must have raised; the start of the ranks and the import
            of the function's module do not count, what the function imports itself does.
        pool: As ``run`` takes it.
        kwargs: Named arguments of the function.

    Returns:
        Each rank's error as "Type: message".

    Raises:
        RankError: a rank returned, died or was still at work after ``within`` seconds, or an
            all-reduce after the errors did not give the sum in that time. The ranks are ended.
    """
    return _pool(world, pool).expect_errors(
        function.__module__, function.__qualname__, args, kwargs, within
    )


def run_refused(
    world: int, match: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Assert that ``function(*args)`` raises on every rank an error in which ``match`` is found.

    The ranks stay: see ``run_expecting_errors``, whose ``within`` and ``pool`` this takes too.

    Raises:
        RankError: a rank did not raise, or the ranks' group is broken.
        AssertionError: a rank raised something else.
    """
    for text in run_expecting_errors(world, function, *args, **kwargs):
        assert re.search(match, text), text
