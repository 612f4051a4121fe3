"""The same tokens with every optimizer: an lr sweep, then three seeds at the best, on two models.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.convergence --peers /tmp/peers --minutes 60
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.convergence --model 16m --peers /tmp/peers
    .venv/bin/python -m benchmarks.convergence --table --plot runs/convergence.png

Model, corpus, batches, schedule, clipping and evaluation are launch/'s own, in one process, as in
benchmarks.sumo_quickstart, whose GaLore (galore-torch 1.0, in the folder --peers) this has. Each
optimizer gets its lr, half and twice that with seed 0, and more beyond while the best is the last;
then seeds 1 and 2 at the best. A run is a file of its own in --results: what is there is not run
again, so that the command goes on where it was stopped. After --minutes no run begins.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import poet_quickstart, sumo_quickstart
from benchmarks.sumo_quickstart import GALORE, ROOT, QuickstartContender, state_bytes
from spectral_dist.launch import corpus, files, llama, ranks, report, torch_config, trainer

MODELS: dict[str, dict[str, int]] = {
    "quickstart": {},
    "16m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7},
}
"""What differs from configs/models/quickstart.json: 4.2 and 15.5 million parameters."""
REST = {"scalar_lr": 0.006}
CONTENDERS = (
    QuickstartContender("AdamW", "AdamW", 0.003),
    QuickstartContender("Muon", "Muon", 0.012),
    QuickstartContender("NorMuon", "NorMuon", 0.012),
    QuickstartContender(
        "PolarGrad", "PolarGrad", 0.3,
        {"weight_decay": 0.002, "scalar_weight_decay": 0.1, **REST},
    ),
    QuickstartContender("ROOT", "ROOT", 0.012),
    QuickstartContender("SUMO, r = 1/4", "SUMO", 0.012, {"rank": 0.25, "period": 50}),
    QuickstartContender("POET, b = 64", "POET", 0.002, {"block": 64, "merge_every": 20, **REST}),
    QuickstartContender("GaLore, r = 1/4", "GaLore", 0.02, {"rank": 0.25, **GALORE}),
)  # fmt: skip


class ConvergenceEngine(sumo_quickstart.QuickstartEngine):
    """The torch engine with a contender's optimizer; POET's model is converted first."""

    def make_optimizer(self) -> Any:
        """Build the contender's."""
        if self.contender.kind != "POET":
            return super().make_optimizer()
        options = self.config.options
        adam = {name: getattr(options, name) for name in ("betas", "eps", "weight_decay")}
        self.model, optimizer = poet_quickstart.build(
            self.model, self.contender, adam, lambda model: model
        )
        return optimizer


@dataclass(frozen=True)
class ConvergenceSettings:
    """What all runs of one model share.

    Attributes:
        model: a key of MODELS.
        steps: of 16 x 256 tokens.
        tiny: for a test: one layer, batches of 2 rows, one of them evaluated.
        data: as pretrain.py's.
        results, peers: folders: of the runs' files, and of galore-torch.
    """

    model: str
    steps: int
    results: Path
    peers: str = ""
    tiny: bool = False
    data: tuple[str, ...] = ()


class ConvergenceRuns:
    """Runs, each done once and written to a file."""

    def __init__(
        self, settings: ConvergenceSettings, here: ranks.Ranks, deadline: float = math.inf
    ) -> None:
        self.settings, self.here, self.deadline = settings, here, deadline
        content = json.loads((ROOT / "configs/models/quickstart.json").read_text("utf-8"))
        content |= MODELS[settings.model]
        if settings.tiny:
            content["num_hidden_layers"] = 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.json"
            path.write_text(json.dumps(content), encoding="utf-8")
            self.model = llama.load_config(path)
        shipped = torch_config.read(ROOT / "configs/torch/adamw.yaml")
        warmup = min(shipped.warmup, settings.steps // 10)
        batch = 2 if settings.tiny else shipped.batch
        self.config = replace(shipped, steps=settings.steps, warmup=warmup, batch=batch)
        self.text = corpus.load(settings.data, self.model.vocab_size)

    def path(self, contender: QuickstartContender, seed: int) -> Path:
        """Return the file of a run."""
        name = f"{self.settings.model}-{contender.kind}-{contender.lr:g}-{seed}.json"
        return self.settings.results / name

    def run(self, contender: QuickstartContender, seed: int = 0) -> dict[str, Any]:
        """Train to the end, unless that is done; bits_per_byte is null if it diverged.

        Raises:
            TimeoutError: the time is over.
            ValueError: the file of the run is one of another text or number of steps.
        """
        path = self.path(contender, seed)
        known = {"model": self.settings.model, "name": contender.name, "kind": contender.kind,
                 "lr": contender.lr, "options": dict(contender.options), "seed": seed,
                 "steps": self.settings.steps, "corpus": self.text.key}  # fmt: skip
        known = json.loads(json.dumps(known))
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text("utf-8"))
            for key, value in known.items():
                if record[key] != value:
                    raise ValueError(
                        f"{path}: {key} is {record[key]!r}, and {value!r} is asked for"
                    )
            return record
        if time.monotonic() > self.deadline:
            raise TimeoutError("the time is over: the same command goes on with the next run")
        record = {**known, **self._train(contender, seed)}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, json.dumps(record) + "\n")
        print(f"{path.name}: {record['bits_per_byte']} bits per byte, {record['seconds']:.0f} s")
        return record

    def _train(self, contender: QuickstartContender, seed: int) -> dict[str, Any]:
        """Return what was measured in a run."""
        started = time.perf_counter()
        torch.manual_seed(seed)
        engine = ConvergenceEngine(
            contender, self.settings.peers, self.config, self.model, seed, self.here
        )
        found: dict[str, Any] = {"parameters": engine.num_parameters, "bits_per_byte": None}
        with tempfile.TemporaryDirectory() as folder:
            settings = trainer.RunSettings(
                out=Path(folder), steps=self.settings.steps, stop_at=0, seq_len=256, seed=seed,
                eval_every=max(1, self.settings.steps // 6), save_every=0, prompt="To create",
                eval_batches=1 if self.settings.tiny else 8,
            )  # fmt: skip
            try:
                summary = trainer.Trainer(settings, engine, self.text, self.here).run()
            except FloatingPointError:
                summary = None
            rows = report.read_metrics(Path(folder))
        if summary is not None:
            names = ("forward_backward_seconds", "optimizer_seconds")
            found |= {"bits_per_byte": summary["validation_bits_per_byte"]}
            found |= {name: summary[name] for name in names}
        for part in ("train", "validation"):
            found[part] = [
                [r["step"], round(r["bits_per_byte"], 4)] for r in rows if r["part"] == part
            ]
        found["state"] = state_bytes(engine.optimizer, engine.model)
        found["device"] = str(self.here.device)
        return {**found, "seconds": time.perf_counter() - started}

    def best(self, contender: QuickstartContender) -> QuickstartContender:
        """Return the best lr of the given one, half and twice that, and on while it is the last."""
        middle = contender.lr
        best = min((replace(contender, lr=middle * f) for f in (0.5, 1, 2)), key=self._bits)
        factor = best.lr / middle
        while factor != 1:
            further = replace(best, lr=best.lr * factor)
            if self._bits(further) >= self._bits(best):
                break
            best = further
        return best

    def _bits(self, contender: QuickstartContender) -> float:
        bits = self.run(contender)["bits_per_byte"]
        return math.inf if bits is None else float(bits)


def read(results: Path) -> list[dict[str, Any]]:
    """Return all runs in a folder."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]


def at_best_lr(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """Return by model and optimizer all seeds at the lr that is best with seed 0."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for record in records:
        groups.setdefault((record["model"], record["name"]), []).append(record)
    chosen = {}
    for key, runs in groups.items():
        first = [r for r in runs if r["seed"] == 0 and r["bits_per_byte"] is not None]
        if first:
            lr = min(first, key=lambda r: r["bits_per_byte"])["lr"]
            chosen[key] = [r for r in runs if r["lr"] == lr and r["bits_per_byte"] is not None]
    return chosen


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return markdown: the mean of the seeds at the best lr, and how far they are apart."""
    titles = ("model", "optimizer", "lr (tried)", "bits per byte", "least to most", "seeds",
              "optimizer s", "state MB")  # fmt: skip
    rows: list[Sequence[str]] = [titles, ["---"] * len(titles)]
    chosen = at_best_lr(records)
    for (model, name), runs in sorted(
        chosen.items(), key=lambda item: (item[0][0], _mean(item[1]))
    ):
        tried = sorted({r["lr"] for r in records if (r["model"], r["name"]) == (model, name)})
        bits = [r["bits_per_byte"] for r in runs]
        rows.append((
            model, name, f"{runs[0]['lr']:g} ({', '.join(f'{lr:g}' for lr in tried)})",
            f"{statistics.fmean(bits):.3f}", f"{min(bits):.3f} to {max(bits):.3f}", str(len(runs)),
            f"{statistics.fmean(r['optimizer_seconds'] for r in runs):.0f}",
            f"{runs[0]['state']['all'] / 1e6:.1f}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean(runs: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(r["bits_per_byte"] for r in runs)


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot validation against steps: all seeds at each optimizer's best lr, a model a panel."""
    from matplotlib.figure import Figure

    chosen = at_best_lr(records)
    models = sorted({model for model, _ in chosen})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for place, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), place + 1)
        for number, (name, runs) in enumerate((n, r) for (m, n), r in chosen.items() if m == model):
            for run in runs:
                label = f"{name}, lr {run['lr']:g}" if run is runs[0] else None
                axes.plot(*zip(*run["validation"], strict=True), color=f"C{number}", label=label)
        axes.set(title=model, xlabel="step", ylabel="validation, bits per byte")
        axes.legend()
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[str, typer.Option(help=" or ".join(MODELS))] = "quickstart",
    steps: Annotated[int, typer.Option(help="of 4,096 tokens, for every run")] = 480,
    minutes: Annotated[float, typer.Option(help="after them no run begins")] = math.inf,
    only: Annotated[str, typer.Option(help="comma-separated kinds; all")] = "",
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one")] = "cpu",
    peers: Annotated[str, typer.Option(help="folder of galore-torch")] = "/tmp/peers",
    results: Annotated[Path, typer.Option(help="a file for each run")] = (
        ROOT / "benchmarks/results/convergence"
    ),
    shows: Annotated[bool, typer.Option("--table", help="what is there, and no run")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="the same as PNG")] = None,
) -> None:
    """Run what is not there, and print the table."""
    if model not in MODELS or device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--model is {' or '.join(MODELS)}, --device cpu or cuda")
    if not shows and picture is None:
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif not torch.cuda.is_available():
            raise typer.BadParameter("--device cuda: torch sees none here; write --device cpu")
        settings = ConvergenceSettings(model, steps, results, peers)
        bench = ConvergenceRuns(settings, ranks.start(), time.monotonic() + 60 * minutes)
        for contender in CONTENDERS:
            if not only or contender.kind in only.split(","):
                try:
                    best = bench.best(contender)
                    for seed in (1, 2):
                        bench.run(best, seed)
                except (ImportError, TimeoutError) as error:
                    print(f"{contender.name}: {error}")
        ranks.stop()
    print(table(read(results)))
    if picture is not None:
        plot(read(results), picture)


if __name__ == "__main__":
    typer.run(main)
