"""Time of a rotated layer's forward and backward pass over nn.Linear's, on this machine.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.poet_layer

nn.Linear trains its weight; POET's layer, its rotations, of which it makes G in every pass.
``fast``, ``memory``: its variants; the latter saves only its input. ``turns``: rotations and
product one after the other, as Megatron's layers do it. Medians of ratios within one turn over all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import linear

from spectral_dist import poet

SHAPES = (
    (512, 1024, 1024, 256), (2048, 1024, 1024, 256), (2048, 1024, 2816, 256), (2048, 1024, 2816, 64)
)  # fmt: skip
"""Tokens, inputs, outputs, b."""


def rotated(n: int, m: int, dtype: torch.dtype, **settings: Any) -> Any:
    """One rotated layer."""
    model = nn.Sequential(nn.Linear(n, m, bias=False)).to(dtype)
    layer = poet.convert(model, matrices=["0"], **settings)[0]  # type: ignore[index]
    for skew in layer.skews.values():
        nn.init.normal_(skew.data, std=1e-3)
    return layer


def contenders(n: int, m: int, b: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, what is timed."""
    fast = rotated(n, m, dtype, block=b)

    def turns(x: Tensor) -> Tensor:
        return fast.rotate_rows(linear(fast.rotate_rows(x, fast.inner), fast.weight), fast.outer)  # type: ignore[no-any-return]

    return {
        "nn.Linear": nn.Linear(n, m, bias=False, dtype=dtype),
        "fast": fast,
        "memory": rotated(n, m, dtype, block=b, variant="memory"),
        "turns": turns,
    }


def main(turns: int = 9) -> None:
    """Time all, and print a table."""
    print("| tokens, in, out, b | dtype | nn.Linear ms | fast | memory | turns |")
    print("|---|---|--:|--:|--:|--:|")
    for dtype in (torch.float32, torch.bfloat16):
        for t, n, m, b in SHAPES:
            x = torch.randn(t, n, dtype=dtype, requires_grad=True)
            gradient = torch.randn(t, m, dtype=dtype)
            timed: dict[str, list[float]] = {}
            layers = contenders(n, m, b, dtype)
            for _ in range(turns + 1):  # the first is not counted
                for name, layer in layers.items():
                    start = time.perf_counter()
                    layer(x).backward(gradient)
                    timed.setdefault(name, []).append(time.perf_counter() - start)
            base = timed.pop("nn.Linear")[1:]
            ratios = [
                statistics.median(a / b for a, b in zip(found[1:], base, strict=True))
                for found in timed.values()
            ]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {t}, {n}, {m}, {b} | {name} | {1e3 * statistics.median(base):.1f} | {cells} |"
            )


if __name__ == "__main__":
    typer.run(main)
