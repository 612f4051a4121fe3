"""Record a run's metrics in a file and TensorBoard, and show finished runs side by side."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectral_dist.launch import files
from spectral_dist.monitor import Report, to_tensorboard

METRICS = "metrics.jsonl"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Log:
    """The metrics.jsonl and TensorBoard log of one run.

    Records after the step that a run resumes from are dropped, since it repeats them. A kill at any
    moment leaves the lines that were there, and at most the last one cut.
    """

    def __init__(self, out: Path, done: int) -> None:
        """Open the log of a run that has done ``done`` steps; 0: a new run."""
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        path = out / METRICS
        records: list[dict[str, Any]] = []
        if done and not path.is_file():
            print(f"pretrain: {path} is missing: it begins anew after step {done}", flush=True)
        elif done:
            records, wrong_lines, _ = _read(path)
            for number in wrong_lines:
                print(f"pretrain: {path}:{number}: no whole record, left out", flush=True)
        lines = [json.dumps(record) + "\n" for record in records if record["step"] <= done]
        files.replace(path, "".join(lines))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(out / "tensorboard", purge_step=done + 1)

    def _write(self, part: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        self._file.write(json.dumps({"part": part, "step": step, **values}) + "\n")
        self._file.flush()

    def add(self, part: str, step: int, values: dict[str, float]) -> None:
        """Record values of a step under "train" or "validation": one line, one point per value."""
        self._write(part, step, values)
        for name, value in values.items():
            self._board.add_scalar(f"{part}/{name}", value, step)

    def matrices(self, step: int, report: Report) -> None:
        """Record a monitor's report, {quantity: {matrix: value}}: one line, one point per value."""
        self._write("matrices", step, report)
        to_tensorboard(self._board)(step, report)

    def sync(self) -> None:
        """Sync the log to disk, before a checkpoint is saved that the run may resume from."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Write what is buffered, and close both files."""
        self._file.close()
        self._board.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the records of a run; leave out a last line that a kill has cut, and print a message.

    Raises:
        ValueError: there is no file, or another line is no record.
    """
    path = out / METRICS
    if not path.is_file():
        raise ValueError(f"no run in {out}: {path} does not exist")
    records, wrong_lines, lines = _read(path)
    for number in wrong_lines:
        if number < lines:
            raise ValueError(f"{path}:{number}: this line is no record of a run; delete it")
        print(f"{path}:{number}: the last line is cut, and left out", flush=True)
    return records


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int], int]:
    """Return the records of a file, the numbers of lines that are none, and the number of lines."""
    records, wrong_lines = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            int(record["step"]), str(record["part"])
        except (ValueError, KeyError, TypeError):
            wrong_lines.append(number)
        else:
            records.append(record)
    return records, wrong_lines, len(lines)


def plot(runs: Sequence[Path], target: Path) -> None:
    """Plot training loss and validation bits per byte of one or more runs, as a PNG.

    Args:
        runs: folders.
        target: the file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        records = read_metrics(run)
        train = [r for r in records if r["part"] == "train"]
        held_out = {r["step"]: r for r in records if r["part"] == "validation"}
        left.plot([r["step"] for r in train], [r["loss"] for r in train], label=run.name)
        bits = [r["bits_per_byte"] for r in held_out.values()]
        right.plot(list(held_out), bits, marker=".", label=run.name)
    left.set(title="training", xlabel="step", ylabel="loss (nats per token)")
    right.set(title="validation", xlabel="step", ylabel="bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    files.replace(target, picture.getvalue())


def _seconds_and_share(part: str) -> Callable[[dict[str, Any]], str]:
    """Return a cell of the table: seconds, and their share of forward, backward and step."""

    def cell(s: dict[str, Any]) -> str:
        both = s["forward_backward_seconds"] + s["optimizer_seconds"]
        return f"{s[part]:.1f} s ({s[part] / both:.0%})" if both else "-"

    return cell


def _tokens_per_second(s: dict[str, Any]) -> str:
    """Return a cell of the table: tokens per second of forward, backward and step."""
    per_step = s["forward_backward_seconds"] + s["optimizer_seconds"]
    return f"{s['tokens'] / per_step:,.0f}" if per_step else "-"


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "optimizer": lambda s: s["optimizer"],
    "parameters": lambda s: f"{s['parameters']:,}",
    "ranks": lambda s: str(s["ranks"]),
    "steps, tokens": lambda s: f"{s['step']}, {s['tokens']:,}",
    "validation bits per byte": lambda s: f"{s['validation_bits_per_byte']:.4f}",
    "validation loss (nats per token)": lambda s: f"{s['validation_loss']:.4f}",
    "forward + backward": _seconds_and_share("forward_backward_seconds"),
    "optimizer step": _seconds_and_share("optimizer_seconds"),
    "tokens per second": _tokens_per_second,
    "steps that were skipped": lambda s: f"{s.get('skipped_steps', 0):,}",
    "matrices orthogonalized": lambda s: f"{s['matrices_orthogonalized']:,}",
    "bytes sent by the optimizer": lambda s: f"{s['optimizer_bytes_sent']:,}",
    "optimizer state, bytes per rank": lambda s: " ".join(
        f"{b:,}" for b in s["optimizer_state_bytes"]
    ),
    "wall time": lambda s: f"{s['seconds']:.1f} s",
    "sample": lambda s: escape(s["sample"].strip()),
}


def table(summaries: dict[str, dict[str, Any]]) -> Table:
    """Build the table of runs, one column each, from their summaries by name."""
    result = Table()
    result.add_column()
    for name in summaries:
        result.add_column(name, overflow="fold")
    for label, cell in ROWS.items():
        if label == "sample":
            result.add_section()
        result.add_row(label, *(cell(summary) for summary in summaries.values()))
    return result


def show(runs: Sequence[Path], target: Path) -> None:
    """Plot finished runs, and print their table and the path of the plot.

    Raises:
        ValueError: a run has not finished.
    """
    summaries = {}
    for run in runs:
        path = run / "summary.json"
        if not path.is_file():
            raise ValueError(f"no finished run in {run}: {path} does not exist")
        summaries[run.name] = json.loads(path.read_text(encoding="utf-8"))
    plot(runs, target)
    console = Console()
    console.print(table(summaries))
    console.print(f"plot: {target.resolve()}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished runs")],
    plot_path: Annotated[Path, typer.Option("--plot")] = Path("runs/compare.png"),
) -> None:
    """Show finished runs side by side, in one table and one plot."""
    show(runs, plot_path)


@app.callback()
def _several_commands() -> None:
    """Look at finished runs."""


if __name__ == "__main__":
    app()
