"""How long something takes on a device: CUDA events there, perf_counter on CPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CACHE_BYTES = 128 << 20
"""More than a card's L2: inputs are taken in turns until they are as much together."""
MOST_INPUTS = 8


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, until the device has ended it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_ms(
    call: Callable[[int], Any], device: torch.device, seconds: float = 0.5, most: int = 50
) -> float:
    """Return the median milliseconds of ``call(i)``, i = 0, 1, ...; which takes its i-th input.

    Args:
        call: what is timed, on an input that is there already.
        device: where it runs.
        seconds: about how long to repeat; at least one call is timed, three if they are short.
        most: calls at most.
    """
    call(0)  # compiles, allocates, makes handles
    once = seconds_of(lambda: call(1), device)
    repeats = max(1 if once > 1 else 3, min(most, int(seconds / max(once, 1e-6))))
    if device.type != "cuda":
        return 1e3 * statistics.median(
            seconds_of(lambda i=i: call(i), device)
            for i in range(repeats)  # type: ignore[misc]
        )
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for i in range(repeats):
        events[2 * i].record()
        call(i)
        events[2 * i + 1].record()
    torch.cuda.synchronize(device)
    pairs = zip(events[::2], events[1::2], strict=True)
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[torch.Tensor]:
    """Return random tensors of a shape: as many as a cache cannot hold, if they are small."""
    generator = torch.Generator(device).manual_seed(seed)
    one = torch.Size(shape).numel() * dtype.itemsize
    count = min(MOST_INPUTS, max(1, -(-CACHE_BYTES // one))) if device.type == "cuda" else 2
    found = []
    for _ in range(count):
        wide = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        found.append(wide.to(dtype))
    return found


def timed_on(
    function: Callable[[torch.Tensor], Any], given: list[torch.Tensor], seconds: float = 0.5
) -> float:
    """Return the median milliseconds of a function of one tensor, given in turns."""
    return median_ms(lambda i: function(given[i % len(given)]), given[0].device, seconds)
