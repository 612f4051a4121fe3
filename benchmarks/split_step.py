"""Steps of Muon with fewer matrices than ranks: whole at their owners, and split over teams.

    .venv/bin/python -m benchmarks.split_step --ranks 2 --matrices 1

Gloo ranks of one thread with replicas of square matrices; both strategies take turns on the same
ranks. Time: the median of the ratios of the two in the same turn, from barrier to barrier. Where
there are fewer cores than ranks nothing is gained: owners keep the cores busy already.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import nn

import spectral_dist

WARM_UP = 2
STRATEGIES = ("owner", "split")


class Stepper:
    """Muon on this rank's replica of the matrices, and what its steps took."""

    def __init__(self, matrices: int, side: int, strategy: str) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(side, side, bias=False) for _ in range(matrices)]
        self.parameters = [layer.weight for layer in layers]
        groups = spectral_dist.param_groups(nn.ModuleList(layers))
        self.optimizer = spectral_dist.Muon(
            groups, lr=1e-3, strategy=strategy, process_group=dist.group.WORLD
        )
        for p in self.parameters:
            p.grad = torch.randn_like(p)
        self.times: list[float] = []

    def step(self) -> None:
        """One step, timed."""
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.step()
        dist.barrier()
        self.times.append(time.perf_counter() - start)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load."""
        return self.optimizer.all_units[0].plan.imbalance  # type: ignore[attr-defined,no-any-return]


def rank_main(rank: int, ranks: int, matrices: int, side: int, seconds: float, output: str) -> None:
    """Everything on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{output}", rank=rank, world_size=ranks)
    steppers = [Stepper(matrices, side, strategy) for strategy in STRATEGIES]
    begin, elapsed, turn = time.monotonic(), torch.zeros(()), 0
    while turn < WARM_UP + 3 or elapsed.item() < seconds:
        for k in (turn % 2, 1 - turn % 2):
            steppers[k].step()
        elapsed, turn = torch.tensor(time.monotonic() - begin), turn + 1
        dist.broadcast(elapsed, 0)
    difference = max(
        float((a - b).abs().max().detach())
        for a, b in zip(*(stepper.parameters for stepper in steppers), strict=True)
    )
    if rank == 0:
        times = [stepper.times[WARM_UP:] for stepper in steppers]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        largest, shared = (stepper.imbalance for stepper in steppers)
        print(
            f"{matrices} of {side} x {side} on {ranks} ranks, {len(ratios)} turns: owner"
            f" {1e3 * statistics.median(times[0]):.0f} ms, owner / split"
            f" {statistics.median(ratios):.2f}; largest load over the mean {largest:.2f}, split"
            f" {shared:.2f}; largest difference of weights {difference:.1e}"
        )
    dist.destroy_process_group()


def main(
    ranks: int = 2,
    matrices: int = 1,
    side: int = 1024,
    seconds: Annotated[float, typer.Option(help="of measuring, at least 3 turns")] = 30,
) -> None:
    """Measure and print a line."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    with tempfile.TemporaryDirectory() as folder:
        args = (ranks, matrices, side, seconds, f"{folder}/out")
        torch.multiprocessing.spawn(rank_main, args, nprocs=ranks)


if __name__ == "__main__":
    typer.run(main)
