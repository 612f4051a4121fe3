"""Iterations of Muon under DistributedDataParallel, as it is and with ``reduce_to_owners``.

    .venv/bin/python -m benchmarks.ddp_step

Forward, backward and step of a model of ``fsdp_step`` on gloo ranks of one thread; both take turns
on the same ranks. Time: the median of the ratios of the two in the same turn, from barrier to
barrier. MB: sent by a rank in an iteration, mean over ranks; DDP's own all-reduce by the convention
in traffic.py, the rest by the meters.
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
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from benchmarks.fsdp_step import MODELS, VOCABULARY, LanguageModel
from spectral_dist.integrations.torch.reduce_to_owners import reduce_to_owners

WARM_UP = 2


class DDPRunner:
    """Muon on this rank, and what its iterations took."""

    def __init__(self, model_name: str, dtype: str, owners: bool) -> None:
        torch.manual_seed(0)
        self.model = DistributedDataParallel(LanguageModel(MODELS[model_name]))
        groups = spectral_dist.param_groups(self.model)
        self.optimizer = spectral_dist.Muon(groups, lr=1e-4, polar_dtype=dtype, wire_dtype=dtype)
        self.reduction = reduce_to_owners(self.model, self.optimizer) if owners else None
        self.tokens = torch.randint(VOCABULARY, (1, 33))
        self.times: list[float] = []

    def iterate(self) -> None:
        """One iteration, timed."""
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(self.tokens)
        nn.functional.cross_entropy(logits[0, :-1], self.tokens[0, 1:]).backward()
        self.optimizer.step()
        dist.barrier()
        self.times.append(time.perf_counter() - start)

    def all_reduced(self) -> float:
        """Bytes of an all-reduce of all gradients."""
        share = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        return share * sum(p.nbytes for p in self.model.parameters())

    def sent(self) -> float:
        """Bytes that this rank has sent in an iteration."""
        hook = sum(self.reduction.meter.bytes.values()) if self.reduction else 0
        in_iteration = (hook + self.optimizer.comm_bytes) / len(self.times)
        return in_iteration if self.reduction else in_iteration + self.all_reduced()


def rank_main(
    rank: int, ranks: int, model_name: str, dtype: str, seconds: float, output: str
) -> None:
    """Everything on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{output}", rank=rank, world_size=ranks)
    runners = [DDPRunner(model_name, dtype, owners) for owners in (False, True)]
    begin, elapsed, turn = time.monotonic(), torch.zeros(()), 0
    while turn < WARM_UP + 3 or elapsed.item() < seconds:
        for k in (turn % 2, 1 - turn % 2):
            runners[k].iterate()
        elapsed, turn = torch.tensor(time.monotonic() - begin), turn + 1
        dist.broadcast(elapsed, 0)
    sent = torch.tensor([runners[0].all_reduced(), *(runner.sent() for runner in runners)])
    dist.all_reduce(sent)
    if rank == 0:
        times = [runner.times[WARM_UP:] for runner in runners]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        adamw, plain, owners = (sent / ranks / 1e6).tolist()
        print(
            f"{model_name}, {dtype}, {len(ratios)} turns: {1e3 * statistics.median(times[0]):.0f}"
            f" ms plain, plain / reduce_to_owners {statistics.median(ratios):.3f}; MB sent:"
            f" all-reduce alone {adamw:.2f}, plain {plain:.2f}, reduce_to_owners {owners:.2f}"
        )
    dist.destroy_process_group()


def main(
    model: str = "plain",
    dtype: Annotated[str, typer.Option(help="of polar factors and the wire")] = "bfloat16",
    seconds: Annotated[float, typer.Option(help="of measuring, at least 3 turns")] = 100,
    ranks: int = 4,
) -> None:
    """Measure and print a line."""
    os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    with tempfile.TemporaryDirectory() as folder:
        args = (ranks, model, dtype, seconds, f"{folder}/out")
        torch.multiprocessing.spawn(rank_main, args, nprocs=ranks)


if __name__ == "__main__":
    typer.run(main)
