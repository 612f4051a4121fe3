"""Start the processes of a run as one group, and decide a few things on all of them together."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spectral_dist.integrations.torch import mpi

T = TypeVar("T")
distributed: Any = dist
"""The same module without types, for names that torch does not declare as exported."""
LOOPBACK = "127.0.0.1"
START_TIMEOUT = 1800.0
"""Seconds within which all ranks have to start."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the device that it computes on."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Return whether this is the rank that prints and writes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all ranks, in float64."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.cpu()]

    def gather(self, value: int) -> list[int]:
        """Return every rank's value, in rank order."""
        local_value = torch.tensor([value], dtype=torch.int64, device=self.device)
        all_values = [torch.empty_like(local_value) for _ in range(self.world)]
        dist.all_gather(all_values, local_value)
        return [int(v) for v in all_values]

    def together(self, call: Callable[[], T]) -> list[T]:
        """Call a function on every rank, and return what each returned, in rank order.

        Raises:
            ValueError: on every rank if the call raises a ValueError or OSError on any of them, so
                that no rank is left waiting.
        """
        outcome: tuple[T | None, str | None]
        try:
            outcome = (call(), None)
        except (ValueError, OSError) as error:
            outcome = (None, str(error))
        outcomes: list[tuple[T, str | None]] = [outcome] * self.world  # type: ignore[list-item]
        if self.world > 1:
            dist.all_gather_object(outcomes, outcome)
        for _, error_text in outcomes:
            if error_text is not None:
                raise ValueError(error_text)
        return [value for value, _ in outcomes]

    def on_first(self, call: Callable[[], T]) -> T:
        """Call a function on rank 0 alone, and return its result on every rank.

        Raises:
            ValueError: on every rank; see ``together``.
        """
        values = self.together(lambda: [call()] if self.first else [])
        return values[0][0]

    def once_per_node(self, build: Callable[[], T]) -> list[T]:
        """Call a function on one rank of each node, and return the results of all nodes.

        Raises:
            ValueError: on every rank; see ``together``.
        """
        answers = self.together(lambda: [build()] if self.local_rank == 0 else [])
        return [value for values in answers for value in values]


def start() -> Ranks:
    """Join the process group of torchrun, deepspeed or mpirun; without one, be its only process.

    A single process needs no store that others could reach. Ranks of mpirun on one host have one
    that listens on loopback; torchrun and deepspeed bring a store of their own.
    """
    store: Any = None
    if "RANK" not in os.environ:
        if mpi.launched():
            mpi.bootstrap()
            if os.environ["MASTER_ADDR"] == LOOPBACK:
                store = _loopback_store()
        else:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            # DeepSpeed requires them; nobody connects
            os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
            store = distributed.HashStore()
            _use_loopback()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = fresh_store(*read_environment())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend)
    else:
        rank, world, *_ = read_environment()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _loopback_store() -> Any:
    """Return a TCPStore that listens on loopback only.

    torch's own listener would be on all interfaces, unless it is handed a socket.
    """
    rank, world, _, port = read_environment()
    _use_loopback()
    if rank != 0:
        return distributed.TCPStore(LOOPBACK, port, world, is_master=False)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(world)
    return distributed.TCPStore(
        LOOPBACK, port, world, is_master=True, master_listen_fd=listener.detach()
    )


def read_environment() -> tuple[int, int, str, int]:
    """Return rank, number of ranks, and the store's address and port from the environment."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def fresh_store(rank: int, world: int, address: str, port: int) -> Any:
    """Return torchrun's store, under a prefix that no rank of an earlier start has written to.

    torchrun keeps its store when it restarts ranks, and counts its starts nowhere that is the same
    on all nodes: new ranks would find the addresses of ranks that are gone. So rank 0 draws the
    prefix, and hands it to each rank under a key that this rank has drawn.
    """
    tcp_store: Any = distributed.TCPStore(
        address, port, world, is_master=False, timeout=timedelta(seconds=START_TIMEOUT)
    )
    store = distributed.PrefixStore("spectral_dist", tcp_store)
    token = uuid.uuid4().hex
    if rank > 0:
        store.set(f"key/{rank}", token)
        prefix = store.get(token).decode()  # waits until rank 0 has set it
        store.set(f"{prefix}/{rank}", "")
        return distributed.PrefixStore(prefix, store)
    missing_ranks = set(range(1, world))
    deadline = time.monotonic() + START_TIMEOUT
    while missing_ranks:
        for other in sorted(missing_ranks):
            # The key may be from an earlier start, so it is answered until the rank is there.
            if store.check([f"key/{other}"]):
                store.set(store.get(f"key/{other}").decode(), token)
            if store.check([f"{token}/{other}"]):
                missing_ranks.discard(other)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"ranks {sorted(missing_ranks)} have not started in {START_TIMEOUT:g} seconds"
            )
        time.sleep(0.01)
    return distributed.PrefixStore(token, store)


def _use_loopback() -> None:
    """Make gloo listen on loopback, unless the environment names another interface."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
