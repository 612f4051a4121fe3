"""The processes of a run: how they find each other, and the few things they do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from spectral_dist.integrations import mpi

T = TypeVar("T")


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

    def once_per_node(self, build: Callable[[], T]) -> T:
        """build() on one rank of each node, then on the others, which find it done.

        ValueError on every rank if it fails on any: nobody is left waiting.
        """
        errors: list[str] = []
        built: list[T] = []
        for turn in (True, False):
            if (self.local_rank == 0) == turn:
                try:
                    built.append(build())
                except ValueError as error:
                    errors.append(str(error))
            everyones: list[list[str]] = [[] for _ in range(self.world)]
            dist.all_gather_object(everyones, errors)
            for theirs in everyones:
                if theirs:
                    raise ValueError(theirs[0])
        return built[0]


def start() -> Ranks:
    """Join the process group: as torchrun, deepspeed or mpirun started us, or alone."""
    if "RANK" not in os.environ:
        if mpi.launched():
            mpi.bootstrap()
        else:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(mpi.free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
