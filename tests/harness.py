"""Real torch.distributed ranks for tests: pools of processes that stay alive between tests."""

from __future__ import annotations

import atexit
import importlib
import os
import queue
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

TIMEOUT = 240.0


class RankError(AssertionError):
    """Some rank raised; the message holds each rank's traceback."""


def _worker(rank: int, world: int, port: int, todo: Any, done: Any, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
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
            done.put((rank, True, result))
        except BaseException:
            done.put((rank, False, traceback.format_exc()))


class Pool:
    """``world`` ranks that run one function at a time."""

    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.todo = [context.Queue() for _ in range(world)]
        self.done = context.Queue()
        self.logs = [tempfile.mktemp(suffix=f".rank{r}") for r in range(world)]
        self.ranks = [
            context.Process(
                target=_worker, args=(r, world, port, self.todo[r], self.done, self.logs[r]),
                daemon=True,
            )
            for r in range(world)
        ]  # fmt: skip
        # read when a child imports torch; DeepSpeed's own Muon would be compiled for 88 s
        os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
        for process in self.ranks:
            process.start()

    def run(self, module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for todo in self.todo:
            todo.put((module, name, args, kwargs))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(results) + len(errors) < len(self.ranks):
            try:
                rank, fine, value = self.done.get(timeout=0.5)
                (results if fine else errors)[rank] = value
            except queue.Empty:
                heard = results.keys() | errors.keys()
                for rank, process in enumerate(self.ranks):
                    if rank not in heard and process.exitcode is not None:
                        errors[rank] = f"died with exit code {process.exitcode}"
                if time.monotonic() >= deadline:
                    missing = set(range(len(self.ranks))) - heard
                    errors.update(dict.fromkeys(missing, "no answer before the timeout (a hang?)"))
            if errors:  # ranks that wait for one that raised may hang: give them a short while
                deadline = min(deadline, time.monotonic() + 20)
        if any(message.startswith(("died", "no answer")) for message in errors.values()):
            self.kill()
        if errors:
            raise RankError("\n".join(f"--- rank {r}:\n{e}" for r, e in sorted(errors.items())))
        return [results[r] for r in range(len(self.ranks))]

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
        for key in [k for k, pool in POOLS.items() if pool is self]:
            del POOLS[key]

    def kill(self) -> None:
        self.end()
        for log in self.logs:
            if os.path.exists(log):
                sys.stderr.write(Path(log).read_text(errors="replace")[-2000:])


POOLS: dict[tuple[int, str], Pool] = {}


@atexit.register
def _close() -> None:
    for pool in POOLS.values():
        for process in pool.ranks:
            process.kill()


def run(
    world: int, function: Callable[..., Any], *args: Any, pool: str = "", **kwargs: Any
) -> list[Any]:
    """``function(*args)`` on ``world`` ranks of a default gloo group; each rank's result.

    The function must be importable, and is to be called by all ranks alike. Raises RankError with
    every rank's traceback; a rank that raises while others wait never hangs the test. Calls of
    different ``pool``s have different processes, so that what one imports does not reach another.
    """
    if (world, pool) not in POOLS:
        POOLS[world, pool] = Pool(world)
    return POOLS[world, pool].run(function.__module__, function.__qualname__, args, kwargs)
