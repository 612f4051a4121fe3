"""Measure the numbers of a machine's description for `spectral-dist plan`.

    .venv/bin/python -m benchmarks.machine --ranks 2 > my_machine.json
    torchrun --nproc_per_node 8 -m benchmarks.machine --device cuda > my_machine.json

Each number is the median of some tries, all ranks at work at once, as they are in a step. Links
between hosts are those of all ranks (torchrun with --nnodes); on one host they are the same links.
"message" is not measured, and a training step is taken to reach 60% of what large products do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TRIES = 7
SIDE = {"cpu": 1024, "cuda": 8192}
"""The side of the matrices that are multiplied, by device."""
SMALLER = 8
"""How many times smaller the matrices are that show how products of small ones slow down."""
BLOCK = 1 << 23
"""The number of elements that are copied and sent."""
TRAINING_SHARE = 0.6


def median_seconds(work: Callable[[], object], device: str) -> float:
    """Return the median seconds of some tries, after one that is not counted."""
    seconds = []
    for _ in range(TRIES + 1):
        dist.barrier()
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def products(dtype: torch.dtype, device: str, parts: int = 1) -> float:
    """Return the multiply-adds/s of products of square matrices.

    Args:
        dtype: of the matrices.
        device: where they are multiplied.
        parts: how many times smaller the side is than the device's; there are as many matrices.
    """
    side = SIDE[device] // parts
    x = torch.randn(parts, side, side, device=device).to(dtype)
    one_by_one = [x[i : i + 1] for i in range(parts)] if device == "cpu" else [x]
    seconds = median_seconds(lambda: [torch.bmm(y, y) for y in one_by_one], device)
    return parts * side**3 / seconds


def exchange(group: dist.ProcessGroup | None, numel: int, device: str) -> float:
    """Return the seconds of an all-to-all in which a rank has so many elements for all others."""
    ranks = dist.get_world_size(group)
    each = max(1, numel // max(1, ranks - 1))
    sent = torch.zeros(each * ranks, device=device)
    received = torch.empty_like(sent)
    call: Callable[[], object] = lambda: dist.all_to_all_single(received, sent, group=group)  # noqa: E731
    return median_seconds(call, device)


def links(group: dist.ProcessGroup | None, device: str) -> tuple[float, float]:
    """Return the latency and the bytes/s of a group's all-to-all."""
    latency = exchange(group, 1, device)
    return latency, 4 * BLOCK / max(1e-9, exchange(group, BLOCK, device) - latency)


def measure(device: str) -> dict[str, Any]:
    """Return the numbers; every rank of the job calls it."""
    block = torch.zeros(BLOCK, device=device)
    small = [torch.zeros(8, device=device) for _ in range(100)]

    def start_operators() -> Tensor:
        for tensor in small:
            tensor.add_(1.0)
        return small[-1]

    ranks, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    per_host = here or ranks
    half, wide = products(torch.bfloat16, device), products(torch.float32, device)
    slower = wide / products(torch.float32, device, SMALLER)
    numbers = {
        "flops": half,
        "flops_wide": wide,
        "half_speed_side": max(0.0, slower - 1) * SIDE[device] / SMALLER,
        "memory_bandwidth": 3 * 4 * BLOCK / median_seconds(lambda: block.add_(block), device),
        "launch": median_seconds(start_operators, device) / len(small),
        "ranks_per_host": per_host,
        "training_flops": TRAINING_SHARE * half,
    }
    hosts = [
        dist.new_group(list(range(begin, begin + per_host)))
        for begin in range(0, ranks, per_host)
    ]  # fmt: skip
    if ranks > 1:
        within = hosts[dist.get_rank() // per_host] if per_host > 1 else None
        numbers["latency"], numbers["bandwidth"] = links(within, device)
        numbers["host_latency"], numbers["host_bandwidth"] = links(None, device)
    return numbers


def run(rank: int, ranks: int, port: int, device: str) -> None:
    """Be one rank of a job that this script has started."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    job(device)


def job(device: str) -> None:
    """Measure, and print from rank 0."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    numbers = measure(device)
    if dist.get_rank() == 0:
        rounded = {name: float(f"{value:.3g}") for name, value in numbers.items()}
        print(json.dumps(rounded, indent=2))
    dist.destroy_process_group()


def main() -> None:
    """Start ranks here, unless torchrun has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--device", choices=sorted(SIDE), default="cpu")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        job(arguments.device)
        return
    context = get_context("spawn")
    shared = (arguments.ranks, arguments.port, arguments.device)
    processes = [context.Process(target=run, args=(r, *shared)) for r in range(arguments.ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
