"""One rank's share of a step of a large job, on one GPU: nothing is sent, all else is done.

The process group is torch's fake one: every collective returns at once. What would arrive by
all_to_all is random numbers in place of other ranks' shards (copied from a buffer, which the
times contain: it is written at the memory's speed, as a network's would be). What all ranks agree
on arrives as this rank said it, which is what happens where all agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu import contenders, models
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.llama_step import state_bytes
from benchmarks.gpu.timing import synchronize
from spectral_dist.sharding import collectives

NAMES = ("AdamW fused", "Muon", "Muon, gram fp16", "PolarGrad, jordan", "SUMO r = 1/4")
JOBS = (
    ("8B", models.LLAMA_8B, 64, NAMES),
    ("8B", models.LLAMA_8B, 512, NAMES),
    ("70B", models.LLAMA_70B, 512, NAMES[:2]),  # whose plan alone takes each a few seconds
)
SMALL = (("tiny", models.TINY, 4, NAMES),)


def run(bench: Bench) -> None:
    """Measure each optimizer on rank 0 of each job."""
    for title, sizes, ranks, names in SMALL if bench.tiny else JOBS:
        if not bench.has_time(f"{title} on {ranks} ranks", 5):
            continue
        with fake_ranks(ranks, bench.device):
            model = sharded(sizes, ranks, bench)
            for name in names:
                if bench.has_time(f"{name}, {title} on {ranks} ranks", 4):
                    with bench.attempt({"model": title, "ranks": ranks, "optimizer": name}) as row:
                        measure(bench, model, contenders.OPTIMIZERS[name](model), row)
            del model
        bench.free()


@contextmanager
def fake_ranks(ranks: int, device: torch.device) -> Iterator[None]:
    """Be rank 0 of a job whose other ranks are not there."""
    noise = torch.randn(1 << 24, device=device).mul_(1e-3)

    def arrived(
        sent: Tensor, sent_sizes: Sequence[int], received_sizes: Sequence[int], group: Any,
        meter: collectives.Meter,
    ) -> collectives.Pending:  # fmt: skip
        received = sent.new_empty(sum(received_sizes))
        moved = sent.numel() - sent_sizes[collectives.rank(group)]
        meter.count("all_to_all", moved * sent.element_size())
        for part in received.split(len(noise)):
            part.copy_(noise[: len(part)])
        return collectives.Pending(received, None, sent)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with mock.patch.object(collectives, "all_to_all", arrived):
            yield
    finally:
        dist.destroy_process_group()


def sharded(sizes: models.Sizes, ranks: int, bench: Bench) -> nn.Module:
    """Return rank 0's shards of a model in bfloat16, each layer cut on its own."""
    mesh = init_device_mesh(bench.device.type, (ranks,))
    with torch.device("meta"):
        model = models.Llama(sizes).to(bench.half)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=bench.device)
    models.fill(model)
    return model


def give_gradients(model: nn.Module) -> None:
    """Give every parameter's shard a random gradient."""
    for p in model.parameters():
        assert isinstance(p, DTensor)
        local = torch.randn_like(p.to_local()).mul_(1e-3)
        p.grad = DTensor.from_local(
            local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )


def measure(bench: Bench, model: nn.Module, optimizer: Any, row: Row) -> None:
    """Fill in times, collectives and memory of rank 0."""
    give_gradients(model)
    start = time.perf_counter()
    optimizer.step()
    synchronize(bench.device)
    row["first s"] = time.perf_counter() - start
    meter = getattr(optimizer, "meter", collectives.Meter())
    calls, sent = sum(meter.calls.values()), sum(meter.bytes.values())
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    called, ended = [], []
    begin = time.monotonic()
    while len(ended) < (1 if bench.tiny else 7) and time.monotonic() - begin < 2:
        synchronize(bench.device)
        start = time.perf_counter()
        optimizer.step()
        called.append(time.perf_counter() - start)
        synchronize(bench.device)
        ended.append(time.perf_counter() - start)
    steps = len(ended)
    row["ms"] = 1e3 * statistics.median(ended)
    row["call ms"] = 1e3 * statistics.median(called)
    if hasattr(optimizer, "meter"):
        row["polar factors"] = optimizer.polar_calls // (steps + 1)
        row["collectives"] = (sum(meter.calls.values()) - calls) / steps
        row["sent MB"] = (sum(meter.bytes.values()) - sent) / steps / 1e6
    row["state GB"] = state_bytes(optimizer) / 1e9
    if bench.cuda:
        row["peak GB"] = torch.cuda.max_memory_allocated(bench.device) / 1e9
    for p in model.parameters():
        p.grad = None
