"""What a step on many small matrices costs the host: time and operators, on one CPU thread.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.small_matrices [--count 400 --rounds 15]

Every optimizer takes a step in turn, so that a busy machine slows all of them alike; the median of
all rounds counts. ``operators`` are those that torch dispatches, of which a GPU starts a kernel or
none for each.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import nn

import spectral_dist
from benchmarks.gpu.host_cost import Operators

Build = Callable[[nn.Module], torch.optim.Optimizer]


def ours(name: str, **options: Any) -> Build:
    """Return a function that builds one of our optimizers."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        with contextlib.redirect_stderr(io.StringIO()):
            groups = spectral_dist.param_groups(model)
        built: torch.optim.Optimizer = getattr(spectral_dist, name)(groups, lr=0.02, **options)
        return built

    return build


SIDES: dict[str, tuple[int, Build]] = {
    "Muon": (8, ours("Muon")),
    "PolarGrad": (8, ours("PolarGrad")),
    "ROOT": (8, ours("ROOT")),
    "NorMuon": (8, ours("NorMuon")),
    "SUMO, r = 8": (16, ours("SUMO", rank=8)),
    "SUMO, r = 2": (8, ours("SUMO", rank=2)),
    "torch.optim.Muon": (8, lambda model: torch.optim.Muon(model.parameters(), lr=0.02)),
    "AdamW (foreach)": (8, lambda model: torch.optim.AdamW(model.parameters(), foreach=True)),
}
"""The side of the matrices, and the optimizer, by name."""


def main(count: int = 400, rounds: int = 15) -> None:
    """Print microseconds and operators per matrix of each optimizer."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    optimizers = {}
    for name, (side, build) in SIDES.items():
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(count))
        optimizers[name] = build(model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for _ in range(2):
            optimizers[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - begin)
    print("| | us a matrix | operators a matrix |\n|---|---|---|")
    for name, optimizer in optimizers.items():
        with Operators() as operators:
            optimizer.step()
        each = 1e6 * statistics.median(seconds[name]) / count
        print(f"| {name} | {each:.1f} | {sum(operators.calls.values()) / count:.1f} |")


if __name__ == "__main__":
    typer.run(main)
