"""A step as `spectral-dist plan` predicts it, against the step itself, on this machine.

    .venv/bin/python -m benchmarks.plan_step --ranks 2
    bash benchmarks/link_rates.sh

The second line, as root, is of two hosts that launch/hosts.sh makes, over rates of the link between
them. FSDP2 on gloo ranks of one thread, Muon in float32. The machine is measured first, by the same
ranks (benchmarks/machine.py), and then the step, from barrier to barrier; medians. More ranks than
cores slow each other down, which no description of a machine has.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import spectral_dist
from benchmarks.machine import measure
from spectral_dist.estimate import Job
from spectral_dist.estimate.prediction import predict
from spectral_dist.machine import Machine

STEPS = 9
OPTIONS: dict[str, Any] = {"polar_dtype": "float32"}
MODELS = {
    "wide": [(1024, 1024)] * 8,
    "long": [(512, 2048)] * 8,
    "small": [(128, 128)] * 64,
    "mixed": [(1024, 1024)] * 4 + [(256, 1024)] * 8 + [(128, 128)] * 16,
}


def build(shapes: list[tuple[int, int]]) -> nn.Module:
    """Return linear layers of some shapes."""
    return nn.Sequential(*[nn.Linear(n, m, bias=False) for m, n in shapes])


def measured_seconds(model: nn.Module) -> float:
    """Return the median seconds of a step on this rank's shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), lr=1e-3, **OPTIONS)
    for p in model.parameters():
        p.grad = p.detach().clone()
    times = []
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        optimizer.step()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def rank_main(rank: int, ranks: int, output: str) -> None:
    """Be one rank of a job that this script has started."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    dist.init_process_group("gloo", init_method=f"file://{output}", rank=rank, world_size=ranks)
    compare()


def compare() -> None:
    """Predict and take steps on all ranks; rank 0 prints."""
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    machine = Machine.from_user(measure("cpu"))
    if dist.get_rank() == 0:
        print(f"{ranks} ranks, {machine.host_bandwidth / 1.25e8:.3g} Gbit/s between hosts")
    job = Job.from_user("fsdp", dp=ranks, dtype="float32", device="cpu")
    for name, shapes in MODELS.items():
        with torch.device("meta"):
            empty = build(shapes)
        predicted = predict(empty, job, machine, "muon", OPTIONS).seconds
        measured = measured_seconds(build(shapes))
        if dist.get_rank() == 0:
            ratio = predicted / measured
            print(f"{name:6} {1e3 * predicted:8.1f} ms predicted {1e3 * measured:8.1f} {ratio:.2f}")
    dist.destroy_process_group()


def main(ranks: Annotated[int, typer.Option(help="Gloo ranks on this host.")] = 2) -> None:
    """Print predicted and measured milliseconds, and their ratio."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        compare()
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (ranks, f"{folder}/rendezvous"), ranks)


if __name__ == "__main__":
    typer.run(main)
