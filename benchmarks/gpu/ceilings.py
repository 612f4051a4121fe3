"""The card's ceilings, a product of matrices and a copy; and X X^T, of which half is needed."""

from __future__ import annotations

import torch

from benchmarks.gpu import contenders
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import inputs, median_ms, timed_on

GEMM = "bf16 GEMM TFLOP/s"
"""What part b compares with: the best that was measured."""


def run(bench: Bench) -> None:
    """Measure products of n x n, a copy, and X X^T of batches."""
    for n in (64,) if bench.tiny else (8192, 4096):
        with bench.attempt({"what": "GEMM", "n": n}) as row:
            row["ms"], rate = product(bench, n)
            row["TFLOP/s"] = rate
            bench.measured[GEMM] = max(rate, bench.measured.get(GEMM, 0.0))
    with bench.attempt({"what": "copy, read and written"}) as row:
        numel = (1 if bench.tiny else 1024) << 20
        source, target = inputs((2, numel), bench.half, bench.device)[0]
        row["ms"] = median_ms(lambda i: target.copy_(source), bench.device)
        row["GB/s"] = 2 * source.nbytes / row["ms"] / 1e6
    source = target = None
    bench.free()
    for n in (32, 64) if bench.tiny else (1024, 2048, 4096, 8192):
        for batch in (1, 4):
            if bench.has_time(f"X X^T, n {n}, batch {batch}"):
                grams(bench, n, batch)


def product(bench: Bench, n: int) -> tuple[float, float]:
    """Return the milliseconds and TFLOP/s of a product of n x n."""
    left, right = inputs((2, n, n), bench.half, bench.device)[0]
    out = left.new_empty(n, n)
    ms = median_ms(lambda i: torch.mm(left, right, out=out), bench.device, 1.0)
    return ms, 2 * n**3 / ms / 1e9


def grams(bench: Bench, n: int, batch: int) -> None:
    """Add a row for each way to X X^T; TFLOP/s of the half that is needed."""
    given = inputs((batch, n, n), bench.half, bench.device)
    base = 0.0
    for name, function in contenders.grams().items():
        with bench.attempt({"what": f"X X^T {name}", "n": n, "batch": batch}) as row:
            if function is None:
                row["error"] = "not there"
                continue
            row["ms"] = timed_on(function, given, 0.3)
            row["TFLOP/s"] = batch * n**3 / row["ms"] / 1e9
            base = base or row["ms"]
            row["x bmm"] = base / row["ms"]
