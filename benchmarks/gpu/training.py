"""A training of Llama 130M in bfloat16 on the default corpus: tokens/s, loss at equal tokens."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectral_dist
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import synchronize
from spectral_dist import poet
from spectral_dist.launch import batches, corpus, llama

ROOT = Path(__file__).resolve().parents[2]
MODEL, TINY_MODEL = (ROOT / "configs/models" / f"{n}.json" for n in ("llama_130m", "quickstart"))
ROWS, LENGTH = 16, 1024
WARMUP, LAST = 20, 0.1
"""Steps of linear warm-up; the part of the steps that the loss is the mean of."""


@dataclass(frozen=True)
class Contender:
    """An optimizer with lr and options; of POET also how it converts."""

    name: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender("AdamW", 1e-3, {"betas": (0.9, 0.95), "weight_decay": 0.1}),
    Contender("Muon", 2e-3),
    Contender("NorMuon", 2e-3),
    Contender("ROOT", 2e-3),
    Contender("SUMO", 2e-3, {"rank": 0.25, "period": 50}),
    Contender("POET", 5e-4, {"block": 256, "merge_every": 200, "scalar_lr": 1e-3}),
    Contender("PolarGrad", 0.1, {"polar": "jordan", "scalar_lr": 1e-3}),
)


def run(bench: Bench) -> None:
    """Train each for the same time, on the same rows; compare losses after as many tokens."""
    config = llama.load_config(TINY_MODEL if bench.tiny else MODEL)
    rows, length = (2, 32) if bench.tiny else (ROWS, LENGTH)
    start = time.monotonic()
    windows = text(bench, config.vocab_size, length)
    bench.note(f"corpus ready after {time.monotonic() - start:.0f} s")
    losses: dict[str, list[torch.Tensor]] = {}
    made: list[dict[str, Any]] = []
    chosen = [c for c in CONTENDERS if not bench.tiny or c.name in ("AdamW", "Muon", "POET")]
    for place, contender in enumerate(chosen):
        # building the model takes a few seconds of each one's time
        seconds = bench.left() / (len(chosen) - place) - 4
        if not bench.tiny and not bench.has_time(contender.name, 10):
            continue
        with bench.attempt({"optimizer": contender.name, "lr": contender.lr}) as row:
            found = train(bench, contender, config, windows, rows, 0.3 if bench.tiny else seconds)
            losses[contender.name] = found.pop("losses")
            row.update(found)
            made.append(row)
    compare(bench, losses, made, rows * length)


def text(bench: Bench, vocabulary: int, length: int) -> batches.Windows:
    """Return the training text in windows: the default corpus, or for a test a few files of it."""
    if bench.tiny:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "text.txt"
            files = sorted((ROOT / "launch").glob("*.py"))
            source.write_text("\n".join(path.read_text(encoding="utf-8") for path in files))
            loaded = corpus.load([source], vocabulary, Path(folder) / "cache")
            return batches.Windows(loaded.train[:].copy(), length, "training")
    return batches.Windows(corpus.load([], vocabulary).train, length, "training")


def make(contender: Contender, model: nn.Module, device: torch.device) -> Any:
    """Return the optimizer of a model, which moves to the device with its weights in bfloat16.

    Of POET the model is converted first: what it trains stays in float32.
    """
    options, skews = dict(contender.options), set()
    if contender.name == "POET":
        with contextlib.redirect_stderr(io.StringIO()):
            poet.convert(model, block=options.pop("block"))
        layers = [module for module in model.modules() if isinstance(module, poet.PoetLayer)]
        skews = {id(skew) for layer in layers for skew in layer.skews.values()}
    for p in model.parameters():  # and no buffers: rotary frequencies
        if id(p) not in skews:
            p.data = p.data.to(torch.bfloat16)
    model.to(device)
    if contender.name == "AdamW":
        fused = device.type == "cuda"
        return torch.optim.AdamW(model.parameters(), lr=contender.lr, fused=fused, **options)
    with contextlib.redirect_stderr(io.StringIO()):
        groups = spectral_dist.param_groups(model)
    return getattr(spectral_dist, contender.name)(groups, lr=contender.lr, **options)


def train(
    bench: Bench, contender: Contender, config: Any, windows: batches.Windows, rows: int,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Return tokens per second and the loss of each step, after ``seconds`` of training."""
    if contender.name == "POET" and bench.tiny:
        contender = Contender("POET", contender.lr, {**contender.options, "block": 32})
    model = llama.build(config, 0)
    optimizer = make(contender, model, bench.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARMUP))
    losses: list[torch.Tensor] = []
    began = 0.0
    while len(losses) < 3 or time.monotonic() - began < seconds:
        numbers = batches.window_indices(len(losses), rows, windows.count, seed=0)
        batch = windows.rows(numbers).to(bench.device, non_blocking=True)
        loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
        loss.backward()
        clip(optimizer, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
        if len(losses) == 1 or len(losses) % 5 == 0:  # the host runs ahead by no more
            synchronize(bench.device)
        began = began or time.monotonic()  # after the first step, which compiles and plans
    synchronize(bench.device)
    took, steps = time.monotonic() - began, len(losses) - 1
    found: dict[str, Any] = {"steps": len(losses), "losses": losses}
    found["tokens/s"] = steps * rows * windows.length / took
    found["step ms"] = 1e3 * took / steps
    if bench.cuda:
        found["peak GB"] = torch.cuda.max_memory_allocated(bench.device) / 1e9
        torch.cuda.reset_peak_memory_stats(bench.device)
    return found


def clip(optimizer: Any, model: nn.Module) -> None:
    """Clip gradients to norm 1, or what POET wants of it after a merge."""
    factor = optimizer.clip_factor() if isinstance(optimizer, spectral_dist.POET) else 1.0
    torch.nn.utils.clip_grad_norm_(model.parameters(), factor)


def compare(
    bench: Bench, losses: dict[str, list[torch.Tensor]], made: list[dict[str, Any]], tokens: int
) -> None:
    """Fill in the mean loss of the last steps that all have taken, and of the last of each."""
    if not losses:
        return
    common = min(map(len, losses.values()))
    for row in made:
        values = torch.stack(losses[row["optimizer"]]).float().tolist()
        bench.curves[row["optimizer"]] = values
        row[f"loss at {common * tokens / 1e6:.3g}M tokens"] = tail(values[:common])
        row["loss at the end"] = tail(values)
    bench.write()


def tail(values: list[float]) -> float:
    """Return the mean of the last part."""
    last = values[-max(1, math.ceil(LAST * len(values))) :]
    return statistics.fmean(last)
