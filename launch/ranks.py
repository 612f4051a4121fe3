"""The processes of a run: how they find each other, and the few things they do together."""

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
"""For the names that torch exports without saying so."""
LOOPBACK = "127.0.0.1"
PATIENCE = 1800.0
"""Seconds in which all ranks have to start."""


@dataclass(frozen=True)
class Ranks:
    """This process's place, and the device it computes on."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed.cpu()]

    def gather(self, value: int) -> list[int]:
        """Every rank's value, in rank order."""
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        all_values = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_values, mine)
        return [int(v) for v in all_values]

    def together(self, call: Callable[[], T]) -> list[T]:
        """call() on every rank, and what each of them returned, in rank order.

        Raises:
            ValueError: on every rank if it fails on any with a ValueError or an OSError, so that
                nobody is left waiting.
        """
        answer: tuple[T | None, str | None]
        try:
            answer = (call(), None)
        except (ValueError, OSError) as error:
            answer = (None, str(error))
        everyones: list[tuple[T, str | None]] = [answer] * self.world  # type: ignore[list-item]
        if self.world > 1:
            dist.all_gather_object(everyones, answer)
        for _, error_text in everyones:
            if error_text is not None:
                raise ValueError(error_text)
        return [value for value, _ in everyones]

    def on_first(self, call: Callable[[], T]) -> T:
        """call() on rank 0 alone, and what it returned on every rank.

        Raises:
            ValueError: on every rank, as of ``together``.
        """
        values = self.together(lambda: [call()] if self.first else [])
        return values[0][0]

    def once_per_node(self, build: Callable[[], T]) -> list[T]:
        """build() on one rank of each node, and what each of these returned.

        Raises:
            ValueError: on every rank, as of ``together``.
        """
        answers = self.together(lambda: [build()] if self.local_rank == 0 else [])
        return [value for values in answers for value in values]


def start() -> Ranks:
    """Join the process group: as torchrun, deepspeed or mpirun started us, or alone.

    One process alone needs no store that others could reach. Ranks of mpirun on one host have one
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
            # DeepSpeed wants them set; nobody connects
            os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
            store = distributed.HashStore()
            _use_loopback()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = unused_store(*place())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend)
    else:
        rank, world, *_ = place()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _loopback_store() -> Any:
    """torch's store, which listens on all interfaces unless it is handed a socket."""
    rank, world, _, port = place()
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


def place() -> tuple[int, int, str, int]:
    """Rank, ranks, and the store's address and port, of the environment."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def unused_store(rank: int, world: int, address: str, port: int) -> Any:
    """torchrun's store, under a prefix that ranks before a restart have not written to.

    torchrun keeps its store when it restarts ranks, and says nowhere which start this is that is
    the same on all nodes: new ranks would find the addresses of those that are gone. So rank 0
    draws the prefix, and hands it to each rank under a key that this rank has drawn.
    """
    tcp: Any = distributed.TCPStore(
        address, port, world, is_master=False, timeout=timedelta(seconds=PATIENCE)
    )
    store = distributed.PrefixStore("spectral_dist", tcp)
    drawn = uuid.uuid4().hex
    if rank > 0:
        store.set(f"key/{rank}", drawn)
        prefix = store.get(drawn).decode()  # waits for it
        store.set(f"{prefix}/{rank}", "")
        return distributed.PrefixStore(prefix, store)
    waiting = set(range(1, world))
    until = time.monotonic() + PATIENCE
    while waiting:
        for other in sorted(waiting):
            if store.check([f"key/{other}"]):  # perhaps one from before, and soon another
                store.set(store.get(f"key/{other}").decode(), drawn)
            if store.check([f"{drawn}/{other}"]):
                waiting.discard(other)
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(waiting)} have not started in {PATIENCE:g} seconds")
        time.sleep(0.01)
    return distributed.PrefixStore(drawn, store)


def _use_loopback() -> None:
    """Have gloo's own sockets on loopback, unless it was told where."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
