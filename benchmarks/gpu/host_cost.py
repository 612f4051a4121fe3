"""What a step costs the host: time, launches, and where it waits for the device."""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import contenders, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import synchronize

MATRICES, SIDE = 400, 8
SHAPES = 50
"""The shapes of a model in which each is a small batch of its own."""
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
"""Operators that wait for the device of what they are given."""


def run(bench: Bench) -> None:
    """Measure each optimizer on many small matrices; Muon of many shapes, too, and by graphs."""
    for name in contenders.OPTIMIZERS:
        measure(bench, name)
    for shapes in (1, SHAPES):
        for graphs in (False, True)[shapes == 1 :]:
            measure(bench, "Muon", shapes, graphs)


def measure(bench: Bench, optimizer_name: str, shapes: int = 1, graphs: bool = False) -> None:
    """Add the row of one optimizer.

    Args:
        bench: where the row goes.
        optimizer_name: of ``contenders.OPTIMIZERS``.
        shapes: of how many shapes the matrices are.
        graphs: whether polar factors are CUDA graphs.
    """
    count = 6 if bench.tiny else MATRICES
    name = f"{optimizer_name}{f', {shapes} shapes' * (shapes > 1)}{', CUDA graphs' * graphs}"
    if not bench.has_time(name, 2):
        return
    with bench.attempt({"optimizer": name}) as row, contenders.switched(graphs=graphs):
        model = models.Small(count, SIDE, shapes).to(bench.device)
        optimizer = contenders.OPTIMIZERS[optimizer_name](model)
        models.give_gradients(model)
        row.update(times(bench, optimizer, count))
        row["launches"] = launches(bench, optimizer.step)
        with waits(bench) as places:
            optimizer.step()
        row["waits"] = sum(places.values())
        row["lines"] = [f"{name} waits {n} x: {place}" for place, n in places.items()]


def times(bench: Bench, optimizer: Any, count: int) -> dict[str, float]:
    """Return microseconds per matrix of a call of step(), and until the device has ended it."""
    called, ended = [], []
    for _ in range(2):
        optimizer.step()
    begin = time.monotonic()
    for _ in range(2 if bench.tiny else 12):
        synchronize(bench.device)
        start = time.perf_counter()
        optimizer.step()
        called.append(time.perf_counter() - start)
        synchronize(bench.device)
        ended.append(time.perf_counter() - start)
        if time.monotonic() - begin > 1.5:
            break
    named = {"us per matrix": called, "with waiting": ended}
    return {name: 1e6 * statistics.median(found) / count for name, found in named.items()}


def launches(bench: Bench, call: Callable[[], Any]) -> int:
    """Return the kernels, copies and fills that a call launches; on CPUs, operators."""
    if not bench.cuda:
        with Operators() as operators:
            call()
        return sum(operators.calls.values())
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(bench.device)
    kinds = ("LaunchKernel", "MemcpyAsync", "MemsetAsync", "GraphLaunch")
    return sum(
        event.count for event in profile.key_averages() if any(k in event.key for k in kinds)
    )


class Operators(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in WAITS:
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))


def place() -> str:
    """Return the innermost line of spectral_dist that runs now; or of an optimizer, or of all."""
    frames = [f for f in traceback.extract_stack() if "benchmarks/gpu" not in f.filename]
    for part in ("spectral_dist/", "integrations/", "torch/optim/", ""):
        within = [f for f in frames if part in f.filename]
        if not part:
            within = [f for f in frames if "/torch/" not in f.filename] or frames
        if within:
            break
    frame = within[-1]
    short = frame.filename.rpartition("spectral_dist/")[2].rpartition("site-packages/")[2]
    return f"{short}:{frame.lineno} {frame.name}: {frame.line}"


@contextmanager
def waits(bench: Bench) -> Iterator[Counter[str]]:
    """Count the lines at which the host waits for the device.

    By torch's own warnings of operations that synchronise. On CPUs, where none are, by the
    operators that would: also those on tensors that are the host's anyway.
    """
    places: Counter[str] = Counter()
    if not bench.cuda:
        with Operators() as operators:
            yield places
        places.update(operators.places)
        return

    def count(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            places[place()] += 1

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
