"""Relative error to the exact polar factor: Newton-Schulz schedules, shape by shape. CPU, float64.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.root_precision [--steps 60] [--data FILE]

Prints three markdown tables of ||U - U_svd|| / ||U_svd|| after 5 steps:
- random Gaussian matrices, by torch's SVD where that is affordable, and by the singular values'
  distribution for the large shapes of ROOT's table;
- what Muon orthogonalizes in a short training run of configs/models/quickstart.json's model (fewer
  layers), in the second half of the run, with coefficients calibrated to the first half;
- the same matrices clamped at their .90 quantile, which is what ROOT orthogonalizes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import spectral_dist
from spectral_dist import calibrate
from spectral_dist.calibrate import FALLBACK, PUBLISHED, Recorder
from spectral_dist.launch import corpus, llama
from spectral_dist.launch.batches import Windows, window_indices
from spectral_dist.polar import newton_schulz, polar, schedules
from spectral_dist.polar.fit import random_spectrum, relative_error
from spectral_dist.polar.schedules import Row

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ((64, 64), (192, 192), (192, 512), (512, 512), (512, 1376), (512, 2048))
HEADS = ("jordan", "quintic", "polar_express", "ROOT published", "calibrated, random",
         "calibrated, with momentum")  # fmt: skip
SEQ_LEN, BATCH, LR, MOMENTUM = 128, 8, 3e-3, 0.95


def scalar_error(s: Tensor, table: Sequence[Row], safety: float = 1.0) -> float:
    """Of singular values s, after these rows."""
    x = s / safety
    for a, b, c in table:
        x = a * x + b * x**3 + c * x**5
    return ((x - 1).norm() / len(s) ** 0.5).item()


def errors_of(x: Tensor, rows: Mapping[str, Row | None]) -> dict[str, float]:
    """Of one matrix, by its SVD; None is a schedule of that name."""
    x = x.double()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    exact = u @ vh
    found = {}
    for name, row in rows.items():
        if row is None:
            y = polar(x, method=name, compute_dtype="float64")
        else:
            y = newton_schulz.standard((x / x.norm())[None].clone(), [row] * 5)[0]
        found[name] = ((y - exact).norm() / exact.norm()).item()
    return found


def scalar_errors(s: Tensor, rows: Mapping[str, Row | None]) -> dict[str, float]:
    """As ``errors_of``, from normalised singular values."""
    found = {}
    for name, row in rows.items():
        if row is None:
            schedule = schedules.SCHEDULES[name]
            found[name] = scalar_error(s, schedules.rows(name), schedule.safety)
        else:
            found[name] = relative_error(s, row, 5)
    return found


def candidates(shape: tuple[int, int], captured: Tensor | None = None) -> dict[str, Row | None]:
    """The columns of a table: schedules by name, or one row for all steps."""
    found: dict[str, Row | None] = {"jordan": FALLBACK, "quintic": None, "polar_express": None}
    if shape in PUBLISHED:
        found["ROOT published"] = PUBLISHED[shape]
    found["calibrated, random"] = calibrate.calibrate(shape).row
    if captured is not None:
        found["calibrated, with momentum"] = calibrate.calibrate(shape, captured).row
    return found


def show(title: str, lines: Iterable[tuple[str, Mapping[str, float]]]) -> None:
    """A markdown table."""
    print(f"\n{title}\n")
    print("| shape | " + " | ".join(HEADS) + " |")
    print("|---" * (len(HEADS) + 1) + "|")
    for name, found in lines:
        cells = [f"{found[head]:.4f}" if head in found else "-" for head in HEADS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    """An independent normal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def train(steps: int, layers: int, data: list[str]) -> list[tuple[str, Tensor]]:
    """(name, matrix) of what Muon orthogonalizes in every fifth step of a run."""
    config = llama.load_config(ROOT / "configs/models/quickstart.json")
    config.num_hidden_layers = layers
    model = llama.build(config, seed=0)
    windows = Windows(corpus.load(data, config.vocab_size).train, SEQ_LEN, "training")
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), lr=LR, momentum=MOMENTUM)
    found: list[tuple[str, Tensor]] = []
    for step in range(steps):
        rows = windows.rows(window_indices(step, BATCH, windows.count, seed=0))
        loss = model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss
        loss.backward()
        if step % 5 == 4:
            found += momenta(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    print(f"\ntrained {layers} layers for {steps} steps, last loss {loss.item():.3f}")
    return found


def momenta(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """What the coming step will orthogonalize: Nesterov's form of the momentum with its gradient.

    Read from the optimizer's state, so that this measures any version of it.
    """
    found = []
    for group in optimizer.param_groups:
        if group["kind"] == "matrix":
            for i, p in enumerate(group["params"]):
                before = optimizer.state[p].get("exp_avg", torch.zeros_like(p))
                after = before.lerp(p.grad, 1 - MOMENTUM)
                found.append((f"{i}", p.grad.lerp(after, MOMENTUM).detach()))
    return found


def clamped(x: Tensor) -> Tensor:
    """B of ROOT: at the .90 quantile of the magnitudes."""
    limit = x.abs().flatten().quantile(0.9)
    return x.clamp(-limit, limit)


def momentum_table(title: str, captured: Sequence[tuple[str, Tensor]], folder: Path) -> None:
    """Calibrate to the first half of the run, measure on the second."""
    half = len(captured) // 2
    recorder = Recorder(folder / "spectra.pt", every=1)
    for name, x in captured[:half]:
        recorder([name], x[None])
    measured: dict[tuple[int, int], list[dict[str, float]]] = {}
    columns = {shape: candidates(shape, rows) for shape, rows in recorder.spectra.items()}
    for _, x in captured[half:]:
        shape = (min(x.shape), max(x.shape))
        measured.setdefault(shape, []).append(errors_of(x, columns[shape]))
    lines = []
    for shape, found in sorted(measured.items()):
        means = {head: sum(f[head] for f in found) / len(found) for head in found[0]}
        lines.append((f"{shape[0]} x {shape[1]} ({len(found)} matrices)", means))
        rows = {h: r for h, r in columns[shape].items() if h.startswith("calibrated")}
        print(f"{shape}: {rows}")
    show(title, lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--data", action="append", default=[], help="as pretrain.py's")
    options = parser.parse_args()
    lines = []
    for shape in MEASURED:
        found = errors_of(gaussian(shape, seed=0), candidates(shape))
        lines.append((f"{shape[0]} x {shape[1]}", found))
    for shape in PUBLISHED:
        found = scalar_errors(random_spectrum(shape, 4096), candidates(shape))
        lines.append((f"{shape[0]} x {shape[1]} (spectrum)", found))
    show("Random Gaussian matrices", lines)
    captured = train(options.steps, options.layers, options.data)
    with tempfile.TemporaryDirectory() as folder:
        momentum_table("Momentum of a training run (Muon)", captured, Path(folder))
        kept = [(name, clamped(x)) for name, x in captured]
        momentum_table("The same, clamped at the .90 quantile (ROOT)", kept, Path(folder))
    print("\nCPU, float64; the polynomials' own error, without that of rounding.")


if __name__ == "__main__":
    main()
