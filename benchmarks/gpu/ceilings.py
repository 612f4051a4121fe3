"""The card's ceilings, a product of matrices and a copy; and X X^T, of which half is needed."""

from __future__ import annotations

import torch
from torch import Tensor

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
                given = inputs((batch, n, n), bench.half, bench.device)
                symmetric(bench, "X X^T", contenders.grams(bench.device), given)
                del given
    for n in (32,) if bench.tiny else (2048, 4096):
        if bench.has_time(f"b R + c R^2, n {n}"):
            wide = inputs((1, n, n), torch.float32, bench.device)
            given = [(x + x.mT).div_(n**0.5).to(bench.half) for x in wide]
            symmetric(bench, "b R + c R^2", contenders.odd_parts(bench.device), given)


def product(bench: Bench, n: int) -> tuple[float, float]:
    """Return the milliseconds and TFLOP/s of a product of n x n."""
    left, right = inputs((2, n, n), bench.half, bench.device)[0]
    out = left.new_empty(n, n)
    ms = median_ms(lambda i: torch.mm(left, right, out=out), bench.device, 1.0)
    return ms, 2 * n**3 / ms / 1e9


def symmetric(
    bench: Bench, what: str, functions: dict[str, contenders.Unary | None], given: list[Tensor]
) -> None:
    """Add a row for each way to a symmetric result; TFLOP/s of the half that is needed.

    The first is what the others are compared with: its time, and its result in float32.
    """
    batch, n, _ = given[0].shape
    base, exact = 0.0, None
    for name, function in functions.items():
        with bench.attempt({"what": f"{what} {name}", "n": n, "batch": batch}) as row:
            if function is None:
                row["error"] = "not there"
                continue
            row["ms"] = timed_on(function, given, 0.3)
            row["TFLOP/s"] = batch * n**3 / row["ms"] / 1e9
            base = base or row["ms"]
            row["x as fast"] = base / row["ms"]
            if exact is None:
                exact = function(given[0][:1].float())
            row["relative error"] = float(
                (function(given[0])[:1].float() - exact).norm() / exact.norm()
            )
