"""A picture of what was measured: Newton-Schulz, steps, host time, and the training's losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench, Row


def draw(bench: Bench, path: Path) -> None:
    """Write a PNG with a panel for each of four parts, empty for one that was not measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(14, 10), layout="constrained")
    bars(axes[0, 0], bench, "b", "TFLOP/s", lambda r: f"{r['shape']}, {r['form']}")
    bars(axes[0, 1], bench, "d", "ms", lambda r: f"{r['optimizer']}, {r['parameters']}")
    bars(axes[1, 0], bench, "c", "us per matrix", lambda r: str(r["optimizer"]))
    for name, losses in bench.curves.items():
        axes[1, 1].plot(range(1, len(losses) + 1), losses, label=name)
    if bench.curves:
        axes[1, 1].legend()
    axes[1, 1].set(title="training loss by step")
    header = bench.header()
    figure.suptitle(f"{header['device']}, torch {header['torch']}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def bars(axis: Any, bench: Bench, letter: str, column: str, label: Callable[[Row], str]) -> None:
    """Draw one number of a part's rows."""
    result = bench.results.get(letter)
    rows = [row for row in result.rows if column in row] if result else []
    axis.barh([label(row) for row in rows][::-1], [row[column] for row in rows][::-1])
    axis.tick_params(labelsize=6)
    axis.set(title=f"{result.title if result else letter}: {column}")
