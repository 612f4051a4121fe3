"""What `spectral-dist plan` compares, prints and draws."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from spectral_dist.estimate import Job
from spectral_dist.estimate.alternatives import PlannedMatrix, planned
from spectral_dist.estimate.prediction import ADAMW, Prediction, predict
from spectral_dist.launch import files
from spectral_dist.launch.estimates import option_of
from spectral_dist.machine import Machine
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import ROUTING

BARS = 256
"""Ranks are drawn as so many bars at most, each the largest of its ranks."""


@dataclass(frozen=True)
class Compared:
    """One optimizer and strategy of a comparison: a prediction, or why there is none."""

    optimizer: str
    strategy: str
    prediction: Prediction | None
    refusal: str = ""


def compare(
    model: nn.Module,
    job: Job,
    machine: Machine,
    optimizers: Sequence[str],
    strategies: Sequence[str],
    options: Sequence[str],
) -> list[Compared]:
    """Predict every optimizer by every strategy.

    Args:
        model: on the meta device.
        job: the engine and its ranks.
        machine: the speeds.
        optimizers: their names.
        strategies: of ``STRATEGIES``.
        options: NAME=VALUE each, for those of the optimizers that have it, or for
            ``param_groups``.

    Raises:
        ValueError: an option or name is wrong, or no pair of them can be planned.
    """
    values = dict(map(option_of, options))
    routing = {name: values.pop(name) for name in ROUTING if name in values}
    for name in ("strategy", "machine"):
        if name in values:
            raise ValueError(f"--option {name}: write --{name}, which is compared")
    results: list[Compared] = []
    known = {name: specs_of(registry.find(name).options) for name in optimizers}
    for optimizer in optimizers:
        others = set().union(*(known[name] for name in optimizers)) - set(known[optimizer])
        own = {name: value for name, value in values.items() if name not in others}
        for strategy in strategies:
            chosen = {**own, "strategy": strategy}
            if strategy == "auto":  # which chooses more where it knows the machine
                chosen["machine"] = asdict(machine)
            try:
                prediction = predict(model, job, machine, optimizer, chosen, routing)
            except ValueError as error:
                if "strategy is " not in str(error):
                    raise
                results.append(Compared(optimizer, strategy, None, str(error)))
            else:
                results.append(Compared(optimizer, strategy, prediction))
    if not any(result.prediction for result in results):
        raise ValueError(results[0].refusal)
    return results


def comparison(results: Sequence[Compared], training: float | None) -> Table:
    """Return a table of what is compared.

    Args:
        results: of ``compare``.
        training: seconds of forward and backward; None: there is no column of shares.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ["ms", "share", "compute", "exchange", "memory", "launch", "max/mean", "MB"]
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        name = f"{result.optimizer}, {result.strategy}"
        if result.prediction is None:
            table.add_row(name, *["-"] * len(columns))
            continue
        prediction = result.prediction
        parts = [prediction.by_rank[part].max() for part in ("compute", "exchange", "memory")]
        share = "" if training is None else f"{prediction.share(training):.1%}"
        table.add_row(
            name,
            f"{1e3 * prediction.seconds:,.1f}",
            share,
            *(f"{1e3 * float(part):,.1f}" for part in parts),
            f"{1e3 * float(prediction.by_rank['launch'].max()):,.1f}",
            f"{prediction.imbalance:.2f}",
            f"{float(prediction.by_rank['between'].max()) / 1e6:,.0f}",
        )
    adamw = adamw_seconds(next(r.prediction for r in results if r.prediction is not None))
    share = "" if training is None else f"{adamw / (adamw + training):.1%}"
    table.add_row("adamw", f"{1e3 * adamw:,.1f}", share, "0.0", "0.0", f"{1e3 * adamw:,.1f}")
    return table


def adamw_seconds(prediction: Prediction) -> float:
    """Return the seconds of a step of AdamW on the same job, all of which is memory's."""
    stored = prediction.estimate.others.double()
    for counter in prediction.counters:
        stored = stored + counter.unit.by_job_rank.double()
    return float(stored.max()) * ADAMW / prediction.machine.memory_bandwidth


def matrices(prediction: Prediction, each: bool) -> Table:
    """Return a table of where matrices are, and why.

    Args:
        prediction: whose plan is shown.
        each: whether every matrix has a line, or all that have shape, strategy and team in common.
    """
    head = ("matrix" if each else "for example", "shape", "no.", "strategy", "ranks")
    table = Table(*head, "owner", "gram", "split", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    lines: dict[Any, list[PlannedMatrix]] = {}
    for matrix in planned(prediction):
        key = matrix.name if each else (matrix.shape, matrix.strategy, matrix.team, matrix.holders)
        lines.setdefault(key, []).append(matrix)
    reasons: dict[str, str] = {}
    for group in lines.values():
        first = group[0]
        owners = str(first.owner) if each else f"{len({m.owner for m in group})}"
        ranks = owners if first.team == 1 else f"{owners} x {first.team}"
        alone = [first.seconds.get(name) for name in ("owner", "gram", "split")]
        cells = ["-" if s is None else f"{1e3 * s:.2f}" for s in alone]
        name = first.name if each else first.name.removesuffix(".weight").rpartition(".")[2]
        shape = "{} x {}".format(*first.shape)
        table.add_row(name, shape, str(len(group)), first.strategy, ranks, *cells)
        reasons[first.reason] = first.strategy
    notes = [f"{strategy}: {reason}" for reason, strategy in reasons.items()]
    table.caption = "\n".join([*notes, "the last columns: ms of one such matrix alone"])
    table.caption_justify = "left"
    return table


def to_json(
    results: Sequence[Compared], training: float | None, with_matrices: bool
) -> dict[str, Any]:
    """Return a comparison as plain values."""
    lines = []
    for result in results:
        line: dict[str, Any] = {"optimizer": result.optimizer, "strategy": result.strategy}
        prediction = result.prediction
        if prediction is None:
            lines.append({**line, "refused": result.refusal})
            continue
        line["seconds"] = prediction.seconds
        if training is not None:
            line["share"] = prediction.share(training)
        line["imbalance"] = prediction.imbalance
        line["per_rank"] = {
            name: {"max": float(values.max()), "mean": float(values.mean())}
            for name, values in prediction.by_rank.items()
        }
        line["estimate"] = prediction.estimate.summary()
        if with_matrices:
            line["matrices"] = [vars(matrix) for matrix in planned(prediction)]
        lines.append(line)
    adamw = adamw_seconds(next(r.prediction for r in results if r.prediction is not None))
    return {"training_seconds": training, "adamw_seconds": adamw, "compared": lines}


def draw(results: Sequence[Compared], target: Path) -> None:
    """Draw the FLOPs of each rank, and the bytes that it sends over each link, as a PNG.

    Args:
        results: a row of pictures for each that is predicted.
        target: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(r, r.prediction) for r in results if r.prediction is not None]
    figure, rows = pyplot.subplots(
        len(shown), 2, figsize=(10, 3 * len(shown)), layout="constrained", squeeze=False
    )
    for (result, prediction), (left, right) in zip(shown, rows, strict=True):
        ranks = prediction.estimate.job.ranks
        left.bar(*_bars(prediction.estimate.by_rank["flops"] / 1e12), width=_width(ranks))
        left.set(title=f"{result.optimizer}, {result.strategy}", xlabel="rank", ylabel="TFLOP")
        for place, label in (("within", "within the host"), ("between", "to other hosts")):
            positions, heights = _bars(prediction.by_rank[place] / 1e6)
            right.plot(positions, heights, label=label, drawstyle="steps-mid")
        right.set(xlabel="rank", ylabel="MB sent in a step", ylim=(0, None))
        right.legend()
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    files.replace(target, picture.getvalue())


def _width(ranks: int) -> float:
    """Return the width of a bar in ranks."""
    return max(1.0, ranks / BARS)


def _bars(values: Tensor) -> tuple[list[float], list[float]]:
    """Return positions and heights of bars, of neighbouring ranks the largest."""
    groups = list(torch.chunk(values, BARS))
    begins, begin = [], 0
    for group in groups:
        begins.append(begin + (len(group) - 1) / 2)
        begin += len(group)
    return begins, [float(group.max()) for group in groups]


def refusals(results: Sequence[Compared]) -> Iterator[str]:
    """Yield why some are not predicted, a line each."""
    for result in results:
        if result.refusal:
            yield f"{result.optimizer}, {result.strategy}: {result.refusal}"
