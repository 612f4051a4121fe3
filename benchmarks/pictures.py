"""The pictures of README and docs, drawn from what was measured: benchmarks/results.

    .venv/bin/python -m benchmarks.pictures

loss.png: training loss against tokens of every optimizer (results/h100/training.json, which
`python -m benchmarks.gpu --parts g --minutes 2.1 --json ...` writes on a GPU). sent.png: bytes that
a rank sends in a step under FSDP2 (results/fsdp_step.json: what is exact of that which
`python -m benchmarks.fsdp_step --peers DIR --json FILE` writes, its counts).
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOKENS = 16 * 1024
"""How many tokens a step of the training takes."""
SMOOTH = 9
"""Steps of which a point of the curve is the mean."""


def draw_losses(measured: dict[str, Any], path: Path) -> None:
    """Draw training loss against tokens, a line for each optimizer."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, losses in measured["curves"].items():
        middles = range(SMOOTH // 2, len(losses) - SMOOTH // 2)
        means = [fmean(losses[i - SMOOTH // 2 : i + SMOOTH // 2 + 1]) for i in middles]
        axis.plot([(i + 1) * TOKENS / 1e6 for i in middles], means, label=name)
    axis.set(xlabel="million tokens", ylabel="training loss", ylim=(3, 8))
    axis.set_title(f"Llama 130M in bf16, {measured['device']}, 14 seconds each", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_bytes(measured: dict[str, Any], path: Path) -> None:
    """Draw the bytes that a rank sends in a step, a bar for each optimizer."""
    rows = {name: row["sent"] / 1e6 for name, row in measured["rows"]["plain"].items()}
    figure, axis = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    names = sorted(rows, key=lambda name: -rows[name])
    bars = axis.barh(names, [rows[name] for name in names])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.margins(x=0.1)
    ranks = measured["settings"]["ranks"]
    axis.set(xlabel=f"MB that a rank sends in one optimizer step, FSDP2 on {ranks} ranks")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Draw all of them."""
    draw_losses(json.loads((RESULTS / "h100/training.json").read_text()), HERE / "loss.png")
    draw_bytes(json.loads((RESULTS / "fsdp_step.json").read_text()), HERE / "sent.png")


if __name__ == "__main__":
    main()
