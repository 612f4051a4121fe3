"""Optimizer steps under FSDP2, side by side: ours, torch's Muon, other packages' Muons, AdamW.

    .venv/bin/pip install --no-deps --target /tmp/peers \\
        muon_fsdp2==0.3.0 muonium==0.2.0 dtensor_muon==0.1.0 triton
    .venv/bin/python -m benchmarks.fsdp_step --peers /tmp/peers --json step.json

All of them live on the same gloo ranks (one thread each), on the same parameters and gradients, and
take turns, so that a noisy machine is noisy for all. A step is one call of step(), everything in
it; 5 Newton-Schulz steps of the same polynomial, in bfloat16 unless a row says otherwise, eager.
Packages that are not there are named and left out (the last two import triton); dion is not on
PyPI.

ms: median. time, cpu: median of the ratios to "ours bf16" in the same turn, of wall time from
barrier to barrier and of CPU time summed over ranks (less disturbed by other processes, blind to
imbalance). MB: sent by a rank in a step, mean over ranks, by the convention in traffic.py, counted
at torch's dispatcher, whoever calls; calls: collectives. state: MB kept by a rank, mean.

Models: "plain" is 4 layers of d = 512, ff = 2048, with fused QKV as one matrix; "gqa" has seven
shapes: 12 heads of 64 over d = 512, 2 of keys and values, gated ff of 1376, in layer 0 of 2048.
Before each table: the largest Newton-Schulz cost of a rank over the mean.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import spectral_dist
from benchmarks.dispatched_traffic import DispatchedTraffic
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.units import MatrixUnit

VOCABULARY, WIDTH, HEAD, LAYERS = 1024, 512, 64, 4
OURS = "ours bf16"


class Layer(nn.Module):
    """Attention and feed-forward; ``kv`` 0: fused QKV and a plain ff, else grouped and gated."""

    def __init__(self, heads: int, kv: int, ff: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.heads = [heads, kv or heads, kv or heads]
        rows = [HEAD * count for count in self.heads]
        projections = rows if kv else [sum(rows)]
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, r, bias=False) for r in projections)
        self.out = nn.Linear(rows[0], WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, ff, bias=False)
        self.gate = nn.Linear(WIDTH, ff, bias=False) if kv else None
        self.down = nn.Linear(ff, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH), the same."""
        y = self.norms[0](x)
        y = torch.cat([linear(y) for linear in self.qkv], -1)
        parts = [p.unflatten(-1, (-1, HEAD)).transpose(1, 2)
                 for p in y.split([HEAD * h for h in self.heads], -1)]  # fmt: skip
        y = nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self.norms[1](x)
        gate = nn.functional.silu(self.up(y) if self.gate is None else self.gate(y))
        return x + self.down(gate if self.gate is None else gate * self.up(y))


class LanguageModel(nn.Module):
    """LAYERS layers between an embedding and a head; (heads, kv, ff) of each layer."""

    def __init__(self, layers: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(*sizes) for sizes in layers)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens (batch, length)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


MODELS = {
    "plain": [(8, 0, 2048)] * LAYERS,
    "gqa": [(12, 2, 2048)] + [(12, 2, 1376)] * (LAYERS - 1),
}


def sharded(model_name: str) -> LanguageModel:
    """The model over all ranks, each layer on its own, the same numbers every time."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = LanguageModel(MODELS[model_name])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Both:
    """Two optimizers that step one after the other; each parameter is in one of them."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def step(self) -> None:
        """Step both."""
        for part in self.parts:
            part.step()

    state = property(lambda self: {k: v for part in self.parts for k, v in part.state.items()})


Build = Callable[[nn.Module], Any]


def _ours(kind: str, **options: Any) -> Build:
    def build(model: nn.Module) -> Any:
        with contextlib.redirect_stderr(io.StringIO()):  # the table of what is a matrix
            groups = spectral_dist.param_groups(model)
        return getattr(spectral_dist, kind)(groups, lr=1e-4, **options)

    return build


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices (of POET what rotates them), and the rest, as spectral_dist tells them."""
    with contextlib.redirect_stderr(io.StringIO()):
        groups = spectral_dist.param_groups(model)
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "skew": [], "scalar": []}
    for group in groups:
        kinds[group["kind"]] += group["params"]
    return kinds["matrix"] + kinds["skew"], kinds["scalar"]


def _torch_muon(model: nn.Module) -> Any:
    matrices, rest = matrices_and_rest(model)
    muon = torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw")
    return Both(muon, torch.optim.AdamW(rest, lr=1e-4, fused=True))


def _muon_fsdp2(model: nn.Module) -> Any:
    matrices, rest = matrices_and_rest(model)
    groups = [{"params": matrices, "lr": 1e-4, "use_muon": True, "weight_decay": 0.1},
              {"params": rest, "lr": 1e-4, "use_muon": False}]  # fmt: skip
    return importlib.import_module("muon_fsdp2").Muon(groups)


def _dtensor(package: str) -> Build:
    def build(model: nn.Module) -> Any:
        loops = importlib.import_module(f"{package}.orthogonalize.orthogonalize")
        loops.ns_loop_triton = loops.ns_loop  # a GPU's, and the default on CPUs too
        matrices, rest = matrices_and_rest(model)
        groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
        muon = importlib.import_module(package).Muon
        options = {"orthogonalization_strategy": "newton_schulz", "use_cautious_wd": False}
        return muon(groups, lr=1e-4, fused_adam=True, **options)

    return build


@dataclass(frozen=True)
class FSDPContender:
    """How to build an optimizer, and the package it needs."""

    build: Build
    package: str = ""


HALF = {"polar_dtype": "bfloat16", "wire_dtype": "bfloat16"}
FLOAT = {"polar_dtype": "float32", "wire_dtype": "float32"}
CONTENDERS = {
    "AdamW (fused)": FSDPContender(
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True)
    ),
    OURS: FSDPContender(_ours("Muon", **HALF)),
    "ours bf16, no finite check": FSDPContender(_ours("Muon", check_finite=False, **HALF)),
    "ours float32": FSDPContender(_ours("Muon", **FLOAT)),
    "PolarGrad bf16 (jordan)": FSDPContender(_ours("PolarGrad", polar="jordan", **HALF)),
    "PolarGrad float32 (qdwh)": FSDPContender(_ours("PolarGrad", **FLOAT)),
    "ROOT bf16": FSDPContender(_ours("ROOT", **HALF)),
    "SUMO r = 1/4": FSDPContender(_ours("SUMO", rank=0.25)),
    "torch.optim.Muon": FSDPContender(_torch_muon),
    "muon_fsdp2": FSDPContender(_muon_fsdp2, "muon_fsdp2"),
    "muonium": FSDPContender(_dtensor("muonium"), "muonium"),
    "dtensor_muon": FSDPContender(_dtensor("dtensor_muon"), "dtensor_muon"),
}


class FSDPRunner:
    """One contender on this rank, and what its steps took."""

    def __init__(self, contender: FSDPContender, model: nn.Module, grads: Sequence[Tensor]) -> None:
        self.optimizer = contender.build(model)
        self.pairs = list(zip(model.parameters(), grads, strict=True))
        self.times: list[tuple[float, float]] = []  # (barrier to barrier, CPU of this rank), s

    def step(self) -> None:
        """One step, timed, on fresh copies of the gradients: some contenders write into them."""
        for p, grad in self.pairs:
            p.grad = grad.clone()
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        self.optimizer.step()
        cpu = time.process_time() - cpu
        dist.barrier()
        self.times.append((time.perf_counter() - start, cpu))

    def observe(self) -> dict[str, Any]:
        """Of one step, untimed: collectives and bytes; and the state's bytes."""
        meter = getattr(self.optimizer, "meter", None)
        before = meter.bytes.get("all_to_all", 0) if meter else 0
        with DispatchedTraffic() as traffic:
            self.optimizer.step()
        if meter and meter.bytes["all_to_all"] - before != traffic.bytes["alltoall_base_"]:
            raise RuntimeError(f"the meter counts {meter.bytes}, torch sends {traffic.bytes}")
        tensors = [t for s in self.optimizer.state.values() for t in s.values()]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        state = sum(t.nbytes for t in local if isinstance(t, Tensor))
        self.times.clear()
        found = {"calls": dict(traffic.calls), "sent": traffic.bytes.total(), "state": state}
        return found | {"times": self.times, "loads": loads(self.optimizer)}


def loads(optimizer: Any) -> list[float]:
    """Newton-Schulz multiply-adds of every rank; none if it is not one of ours."""
    if not isinstance(optimizer, SpectralOptimizer):
        return []
    units = [unit for group in optimizer.param_groups for unit in optimizer.units(group)]
    return [
        sum(x)
        for x in zip(
            *(unit.plan.loads for unit in units if isinstance(unit, MatrixUnit)), strict=True
        )
    ]


def imbalance(found: Sequence[float]) -> float:
    """The largest load over the mean."""
    return max(found) * len(found) / sum(found)


def rank_main(rank: int, ranks: int, model_name: str, seconds: float, names: list[str],
              peers: str, output: str) -> None:  # fmt: skip
    """Everything of one model on one rank; what was measured goes to output.RANK."""
    sys.path.append(peers)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{output}", rank=rank, world_size=ranks)
    model = sharded(model_name)
    logits = model(torch.randint(VOCABULARY, (1, 65)))
    nn.functional.cross_entropy(logits[0, :-1], torch.randint(VOCABULARY, (64,))).backward()
    grads = [p.grad for p in model.parameters()]
    runners = [FSDPRunner(CONTENDERS[name], model, grads) for name in names]
    for runner in runners:
        runner.step()
    found = {n: r.observe() for n, r in zip(names, runners, strict=True)}
    begin, elapsed, turn = time.monotonic(), torch.zeros(()), 0
    while turn < 3 or elapsed.item() < seconds:
        for k in range(len(runners)):
            runners[(k + turn) % len(runners)].step()
        elapsed, turn = torch.tensor(time.monotonic() - begin), turn + 1
        dist.broadcast(elapsed, 0)
    Path(f"{output}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(ranks: int, *args: Any) -> dict[str, dict[str, Any]]:
    """The rows of one model, measured in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.spawn
        spawn(rank_main, (ranks, *args, f"{folder}/out"), nprocs=ranks)
        found = [json.loads(Path(f"{folder}/out.{r}").read_text()) for r in range(ranks)]
    rows: dict[str, dict[str, Any]] = {}
    for name in found[0]:
        parts = [f[name] for f in found]
        mean = {key: statistics.mean(p[key] for p in parts) for key in ("sent", "state")}
        row = {**parts[0], **mean, "seconds": [wall for wall, _ in parts[0]["times"]]}
        row["cpu"] = [sum(c for _, c in t) for t in zip(*(p["times"] for p in parts), strict=True)]
        rows[name] = row
    for row in rows.values():
        for key, times in (("time", "seconds"), ("cpu ratio", "cpu")):
            pairs = zip(row[times], rows[OURS][times], strict=True)
            row[key] = statistics.median(a / b for a, b in pairs)
    return rows


def show(model_name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Print one model's balance and table; the targets that are missed."""
    matrices = matrices_and_rest(LanguageModel(MODELS[model_name]))[0]
    found = rows[OURS]["loads"]
    over = imbalance(found)
    print(
        f"\n{model_name}: {len(matrices)} matrices of {len({m.shape for m in matrices})} shapes,"
        f" {sum(m.numel() for m in matrices):,} numbers; largest load over mean {over:.3f};"
        f" {len(rows[OURS]['times'])} turns\n"
    )
    titles = ("median ms", "least ms", "time", "cpu", "calls", "MB sent", "state MB")
    print(f"| {'optimizer':<26} | {' | '.join(titles)} |\n|---|{'--:|' * len(titles)}")
    for name, row in rows.items():
        cells = [f"{1e3 * f(row['seconds']):.0f}" for f in (statistics.median, min)]
        cells += [f"{row['time']:.2f}", f"{row['cpu ratio']:.2f}", f"{sum(row['calls'].values())}"]
        cells += [f"{row[key] / 1e6:.2f}" for key in ("sent", "state")]
        cells = [cell.rjust(len(title)) for cell, title in zip(cells, titles, strict=True)]
        print(f"| {name:<26} | {' | '.join(cells)} |")
    others = [
        n for n, c in CONTENDERS.items() if n in rows and (c.package or c.build is _torch_muon)
    ]
    missed = [f"{model_name}: {n} is faster" for n in others if rows[n]["time"] < 1]
    if over > 1.15 and len(matrices) >= 4 * len(found):
        missed.append(f"{model_name}: the largest load is {over:.3f} times the mean")
    return missed


def main(
    peers: Annotated[str, typer.Option(help="folder of the other packages")] = "/tmp/peers",
    models: Annotated[str, typer.Option(help="comma-separated")] = ",".join(MODELS),
    seconds: Annotated[float, typer.Option(help="of measuring a model, at least 3 turns")] = 100,
    ranks: int = 4,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
) -> None:
    """Measure, print a table per model, and say which targets are missed."""
    os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    sys.path.append(peers)
    needed = {c.package for c in CONTENDERS.values() if c.package}
    missing = sorted(p for p in needed if importlib.util.find_spec(p) is None)
    names = [n for n, c in CONTENDERS.items() if c.package not in missing]
    print(f"{ranks} ranks, float32 parameters; missing: {', '.join(missing) or 'none'}")
    results: dict[str, Any] = {}
    missed: list[str] = []
    for name in models.split(","):
        results[name] = run(ranks, name, seconds, names, peers)
        missed += show(name, results[name])
    print("\n", *(missed or ["faster than every other, loads within 1.15 of the mean"]), sep="\n")
    if json_path is not None:
        settings = {"ranks": ranks, "models": {n: MODELS[n] for n in results}}
        json_path.write_text(json.dumps({"settings": settings, "rows": results}, indent=1))


if __name__ == "__main__":
    typer.run(main)
