"""POET's layer, forward and backward, against nn.Linear, at Llama 8B's shapes in bfloat16."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import inputs, median_ms
from benchmarks.poet_layer import rotated

TOKENS, BLOCK = (2048, 8192), 256
VARIANTS = ("nn.Linear", "fast", "memory", "fast, TF32", "memory, TF32")
"""With TF32, the map of the blocks multiplies in it: what set_float32_matmul_precision allows."""


def shapes(sizes: models.Sizes) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a layer's different matrices."""
    width, inner, kv = sizes.width, sizes.inner, sizes.kv
    return [(width, width), (width, kv), (width, inner), (inner, width)]


def run(bench: Bench) -> None:
    """Measure each variant at each shape and number of tokens."""
    sizes, numbers, block = (models.TINY, (16,), 16) if bench.tiny else (
        models.LLAMA_8B, TOKENS, BLOCK)  # fmt: skip
    for tokens, (n, m) in itertools.product(numbers, shapes(sizes)):
        base = 0.0
        for name in VARIANTS:
            if not bench.has_time(f"{name} at {n} -> {m}, {tokens} tokens"):
                continue
            row = {"tokens": tokens, "in": n, "out": m, "b": block, "layer": name}
            with bench.attempt(row), float32_products("high" if "TF32" in name else "highest"):
                layer = build(bench, name.partition(",")[0], n, m, block)
                row["ms"], row["peak GB"] = measure(bench, layer, tokens, n, m)
                base = base or row["ms"]
                row["x nn.Linear"] = row["ms"] / base
                del layer


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set how torch multiplies in float32, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def build(bench: Bench, name: str, n: int, m: int, block: int) -> nn.Module:
    """Return a layer on the device."""
    if name == "nn.Linear":
        return nn.Linear(n, m, bias=False, dtype=bench.half, device=bench.device)
    layer: nn.Module = rotated(n, m, bench.half, block=block, variant=name)
    return layer.to(bench.device)


def measure(bench: Bench, layer: nn.Module, tokens: int, n: int, m: int) -> tuple[float, Any]:
    """Return the milliseconds of a forward and backward pass, and its peak over what is there."""
    given = [x[:, :n].requires_grad_() for x in inputs((tokens, n), bench.half, bench.device)]
    gradient = inputs((tokens, m), bench.half, bench.device, seed=1)[0]

    def pass_on(i: int) -> None:
        layer(given[i % len(given)]).backward(gradient)

    pass_on(0)
    if not bench.cuda:
        return median_ms(pass_on, bench.device, 0.05), None
    torch.cuda.synchronize(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    pass_on(0)
    torch.cuda.synchronize(bench.device)
    peak = torch.cuda.max_memory_allocated(bench.device) - before
    return median_ms(pass_on, bench.device, 0.4), peak / 1e9
