"""A whole step of each optimizer on Llama 1B's shapes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contenders, models
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.timing import seconds_of, synchronize

LEFT_OUT = ("AdamW foreach",)
SLOW = ("SUMO r = 1/4", "PolarGrad")
"""Which may take seconds a step: measured last, on one kind of parameters."""


def run(bench: Bench) -> None:
    """Measure each optimizer on parameters in bfloat16, then in float32; at last the slow ones."""
    quick = [name for name in contenders.OPTIMIZERS if name not in (*LEFT_OUT, *SLOW)]
    for dtype, names in ((bench.half, quick), (torch.float32, quick), (bench.half, SLOW)):
        model = models.build(models.TINY if bench.tiny else models.LLAMA_1B, dtype, bench.device)
        for name in names:
            if bench.has_time(f"{name} in {dtype}", 10 if names is SLOW else 3):
                with bench.attempt({"optimizer": name, "parameters": str(dtype)[6:]}) as row:
                    measure(bench, model, contenders.OPTIMIZERS[name](model), row)
        del model
        bench.free()


def measure(bench: Bench, model: torch.nn.Module, optimizer: Any, row: Row) -> None:
    """Fill in milliseconds, host time, and memory, of steps on one set of random gradients."""
    models.give_gradients(model)
    row["first ms"] = 1e3 * seconds_of(optimizer.step, bench.device)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
    seconds, calls = [], []
    begin = time.monotonic()
    while len(seconds) < (1 if bench.tiny else 5) and time.monotonic() - begin < 4:
        synchronize(bench.device)
        start = time.perf_counter()
        optimizer.step()
        calls.append(time.perf_counter() - start)
        synchronize(bench.device)
        seconds.append(time.perf_counter() - start)
    row["ms"] = 1e3 * statistics.median(seconds)
    row["call ms"] = 1e3 * statistics.median(calls)
    row["longest ms"] = 1e3 * max(seconds)
    row["state GB"] = state_bytes(optimizer) / 1e9
    if bench.cuda:
        peak = torch.cuda.max_memory_allocated(bench.device)
        row["step's own GB"] = (peak - before) / 1e9
        row["peak GB"] = peak / 1e9
    for p in model.parameters():
        p.grad = None


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of an optimizer's state, also of what belongs to whole matrices."""
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    for unit in getattr(optimizer, "all_units", ()):
        state = getattr(unit, "state", None)
        tensors += [part.values for part in state.parts()] if state is not None else []
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in local if isinstance(t, Tensor)}  # fmt: skip
    return sum(storages.values())
