"""Optimizer steps under Megatron-core's tensor parallelism: ours and its built-in Muon.

    .venv/bin/pip install --no-deps --ignore-requires-python --target /tmp/peers \\
        emerging-optimizers==0.3.0 absl-py triton
    .venv/bin/python -m benchmarks.megatron_step --peers /tmp/peers --json step.json

All of them live on the same gloo ranks (one thread each; all ranks of one tensor-parallel group),
on the same Llama-shaped GPTModel of megatron-core, fetched by launch/test.sh, in float32 and with
the same random gradients, and take turns, so that a noisy machine is noisy for all. They are built
as Megatron builds them and run eagerly; a step is Megatron's optimizer.step(), with its gradient
norm and AdamW on the rest. 5 Newton-Schulz steps of "quintic", which both have: in float32, then in
bfloat16, where the built-in still gathers float32 ("duplicated") and adds Grams up in bfloat16
("distributed"). q, k and v are three matrices in all. The built-in takes gate and up as one; so do
ours, but in rows with "gate|up", against a reference of their own: ``block`` refuses them as one,
since a rank's part of that is no rectangle. It is the mean over a period: 4 steps block by block, a
whole one. What this version or the folder of peers does not have is named and left out.

ms: median. time, cpu: median of the ratios to "ours owner" in the same turn, of wall time from
barrier to barrier and of CPU time summed over ranks. With fewer cores than ranks wall time is more
of the sum of all work than of the busiest rank, so it forgives imbalance. Of one step inside of the
torch optimizers, thus without Megatron's gradient norm, at torch's dispatcher, whoever calls:
calls: collectives, scalar ones too. MB: sent by a rank, mean and largest, by the convention in
traffic.py; formula: the mean that DESIGN's costs, or the built-in's source, say for matrices.
Gmac: 1e9 multiply-adds of all matrix products, of the busiest rank and of all. error: largest of
the first step (block by block, if ever), from the same update in float64 on whole matrices; lr is
1 in it, so that it is that of the direction, whose RMS is 0.2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

from benchmarks.dispatched_traffic import DispatchedTraffic
from spectral_dist.polar.schedules import rows
from spectral_dist.rules.muon import MuonOptions
from tests.support import megatron_cpu
from tests.support import megatron_model as models

VERSION, VOCABULARY, HEAD, LR, DECAY, STEPS, PERIOD = "0.19.2", 1024, 64, 1.0, 0.1, 5, 5
OWNER = "ours owner"


@dataclass(frozen=True)
class MegatronSettings:
    """The model, the tensor-parallel ranks, what all compute in, and how long it is measured."""

    ranks: int
    layers: int
    hidden: int
    ffn: int
    dtype: str
    seconds: float

    @property
    def qkv(self) -> list[int]:
        """Rows of q, k and v in each query group, of which each rank has one."""
        return [self.hidden // self.ranks, HEAD, HEAD]

    def matrices(self, split: int) -> list[tuple[int, int, int]]:
        """(rows, columns, the dimension that ranks cut) of all; fc1 in ``split`` parts."""
        h, fc1 = self.hidden, 2 * self.ffn // split
        layer = [(rows * self.ranks, h, 0) for rows in self.qkv]
        layer += [(h, h, 1), *[(fc1, h, 0)] * split, (h, self.ffn, 1)]
        return layer * self.layers


@dataclass(frozen=True)
class MegatronContender:
    """A strategy of ours, or a mode of the built-in; ``split``: parts of gate and up."""

    mode: str
    ours: bool = True
    split: int = 1
    period: int = 1

    def build(self, ddp: nn.Module, s: MegatronSettings) -> Any:
        """As a user of Megatron does."""
        from megatron.core.optimizer import get_megatron_optimizer

        from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

        common = {"lr": LR, "weight_decay": DECAY, "clip_grad": 0.0}
        if self.ours:
            config = models.optimizer_config(ddp, "spectral_muon", **common)
            dtypes = {"polar_dtype": s.dtype, "wire_dtype": s.dtype}
            options = {"polar": "quintic", "polar_steps": STEPS, "strategy": self.mode, **dtypes}
            with contextlib.redirect_stderr(io.StringIO()):  # the table of what is a matrix
                split = {"linear_fc1": self.split}
                return get_spectral_megatron_optimizer(config, [ddp], split=split, **options)
        muon = {
            "tp_mode": self.mode, "coefficient_type": "quintic", "num_ns_steps": STEPS,
            "momentum": MuonOptions.momentum, "nesterov": True,
            "scale_mode": "spectral", "extra_scale_factor": 0.2,  # our match_rms_adamw
            "fp32_matmul_prec": {"float32": "highest", "bfloat16": "medium"}[s.dtype],
        }  # fmt: skip
        settings = {f"muon_{key}": value for key, value in muon.items()}
        config = models.optimizer_config(ddp, "muon", **common, **settings)
        return get_megatron_optimizer(config, [ddp])

    def formula(self, s: MegatronSettings) -> float | None:
        """Bytes that a rank sends in a step, the mean over ranks; None for what is chosen."""
        p, item = s.ranks, getattr(torch, s.dtype).itemsize
        w, found = (p - 1) / p, 0.0
        for m, n, dim in s.matrices(self.split):
            owner = 2 * w * m * n / p * item
            if self.mode in ("owner", "block"):
                found += owner / self.period
            elif self.mode == "gram":
                from spectral_dist.polar import of_gram

                wide = of_gram.gram_dtype("quintic", STEPS, getattr(torch, s.dtype))
                moved = (m, n)[dim] < (m, n)[1 - dim] or m == 2 * s.ffn  # no slabs of the long side
                found += w * min(m, n) * (min(m, n) + 1) * wide.itemsize + moved * owner
            elif self.mode == "duplicated":
                found += w * m * n * 4
            elif self.mode == "distributed":  # Grams of the side that is whole; the norm
                found += 2 * w * (STEPS * (m, n)[1 - dim] ** 2 * item + 4)
        return None if self.mode == "auto" else found


CONTENDERS = {
    OWNER: MegatronContender("owner"),
    "ours gram": MegatronContender("gram"),
    "ours auto": MegatronContender("auto"),
    "ours owner, gate|up": MegatronContender("owner", split=2),
    "ours gram, gate|up": MegatronContender("gram", split=2),
    "ours block, gate|up": MegatronContender("block", split=2, period=PERIOD),
    "built-in duplicated": MegatronContender("duplicated", ours=False),
    "built-in distributed": MegatronContender("distributed", ours=False),
    "built-in blockwise": MegatronContender("blockwise", ours=False),
}


class Observer(DispatchedTraffic):
    """Also the multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def around(self, step: Any) -> Any:
        """``step``, observed."""

        def call(*args: Any) -> Any:
            with self:
                return step(*args)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if func.namespace == "aten" and name in ("mm", "bmm", "addmm", "baddbmm"):
            self.macs += args["add" in name].numel() * args[1 + ("add" in name)].shape[-1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def full_gradient(name: str, shape: list[int]) -> Tensor:
    """Of a parameter of the whole model, by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1)
    return torch.randn(shape, generator=generator)


@cache
def reference(name: str, shape: tuple[int, ...], split: int, s: MegatronSettings) -> Tensor:
    """The whole weight after its first step, in float64."""
    grad = full_gradient(name, list(shape)).double()
    numbers = torch.arange(shape[0])
    parts = (numbers,)
    if "linear_qkv" in name:
        parts = numbers.view(s.ranks, sum(s.qkv)).split(s.qkv, 1)
    if "linear_fc1" in name:
        parts = numbers.chunk(split)
    weight = (1 - LR * DECAY) * models.weight(name, list(shape)).double()
    for part in parts:
        x = grad[part.flatten()]
        scale = 0.2 * max(x.shape) ** 0.5
        wide = x.shape[0] <= x.shape[1]
        x = (x if wide else x.mT) / x.norm()
        for a, b, c in rows("quintic", STEPS):
            r = x @ x.mT
            x = a * x + (b * r + c * r @ r) @ x
        weight[part.flatten()] -= LR * scale * (x if wide else x.mT)
    return weight


class MegatronRunner:
    """One contender on this rank, and what its steps took."""

    def __init__(self, contender: MegatronContender, ddp: nn.Module, s: MegatronSettings) -> None:
        self.contender, self.s = contender, s
        self.optimizer = contender.build(ddp, s)
        self.inner = [leaf.optimizer for leaf in self.optimizer.chained_optimizers]
        self.parameters = list(models.named_parameters(ddp))
        full = [full_gradient(name, models.full_shape(p)) for name, p in self.parameters]
        self.grads = [models.shard(g, p) for g, (_, p) in zip(full, self.parameters, strict=True)]
        self.times: list[tuple[float, ...]] = []  # (barrier to barrier, CPU of this rank), s

    def step(self) -> tuple[float, float]:
        """One step."""
        for (_, p), grad in zip(self.parameters, self.grads, strict=True):
            p.main_grad.copy_(grad)
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        self.optimizer.step()
        cpu = time.process_time() - cpu
        dist.barrier()
        return time.perf_counter() - start, cpu

    def turn(self) -> None:
        """The steps of a period; their mean is remembered."""
        found = [self.step() for _ in range(self.contender.period)]
        self.times.append(tuple(map(statistics.mean, zip(*found, strict=True))))

    def error(self) -> float:
        """Of the first step, the largest in the matrices that fall to this rank."""
        start = [p.detach().clone() for _, p in self.parameters]
        self.step()
        worst, index = 0.0, 0
        for name, p in self.parameters:
            if p.ndim == 2 and not getattr(p, "is_embedding_or_output_parameter", False):
                whole, index = models.gathered(p.data, p), index + 1
                if index % self.s.ranks == dist.get_rank():
                    expected = reference(name, whole.shape, self.contender.split, self.s)
                    worst = max(worst, (whole - expected).abs().max().item())
        for (_, p), value in zip(self.parameters, start, strict=True):
            p.data.copy_(value)
        return worst

    def observe(self) -> dict[str, float]:
        """Of one step, untimed, the mean over a period: calls, bytes and multiply-adds."""
        observer = Observer()
        meters = [inner.meter for inner in self.inner if self.contender.ours]
        for meter in meters:
            meter.calls, meter.bytes = {}, {}
        for inner in self.inner:
            inner.step = observer.around(inner.step)  # not Megatron's gradient norm
        for _ in range(self.contender.period):
            self.step()
        for inner in self.inner:
            del inner.step
        calls, sent = observer.calls.total(), observer.bytes.total()
        ring = {"all_reduce": 2 * (self.s.ranks - 1) / self.s.ranks}  # a meter counts it once
        for m in meters:  # one, of the leaf that has everything
            expected = sum(ring.get(name, 1) * n for name, n in m.bytes.items())
            if calls != sum(m.calls.values()) or abs(sent - expected) > calls:  # rounded
                raise RuntimeError(f"the meter has {m}, torch {observer.bytes}")
        found = {"calls": calls, "sent": sent, "macs": observer.macs}
        return {key: value / self.contender.period for key, value in found.items()}


def measure(names: list[str], s: MegatronSettings) -> dict[str, Any]:
    """Everything on this rank, which has Megatron and a process group."""
    models.parallel(tp=s.ranks)
    sizes = {"hidden": s.hidden, "ffn": s.ffn, "layers": s.layers, "heads": s.hidden // HEAD}
    ddp = models.wrap(models.gpt(**sizes, query_groups=s.ranks, vocab=VOCABULARY))
    runners = [MegatronRunner(CONTENDERS[name], ddp, s) for name in names]
    errors = [runner.error() for runner in runners]
    reference.cache_clear()
    found = {name: {"error": error, **runner.observe(), "times": runner.times}
             for name, error, runner in zip(names, errors, runners, strict=True)}  # fmt: skip
    begin, elapsed, turn = time.monotonic(), torch.zeros(()), 0
    while turn < 3 * (s.seconds > 0) or elapsed.item() < s.seconds:
        for k in range(len(runners)):
            runners[(k + turn) % len(runners)].turn()
        elapsed, turn = torch.tensor(time.monotonic() - begin), turn + 1
        dist.broadcast(elapsed, 0)
    return found


def rank_main(rank: int, names: list[str], s: MegatronSettings, peers: str, output: str) -> None:
    """One rank; what was measured goes to output.RANK."""
    import typing

    import typing_extensions

    typing.override = typing_extensions.override  # type: ignore[attr-defined]  # from Python 3.12
    sys.path.append(peers)
    logging.getLogger("megatron").setLevel("ERROR")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{output}", rank=rank, world_size=s.ranks)
    megatron_cpu.install(VERSION)
    Path(f"{output}.{rank}").write_text(json.dumps(measure(names, s)))
    dist.destroy_process_group()


def run(names: list[str], s: MegatronSettings, peers: str) -> dict[str, dict[str, Any]]:
    """The rows of one table, measured in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        args = (names, s, peers, f"{folder}/out")
        torch.multiprocessing.spawn(rank_main, args, nprocs=s.ranks)
        ranks = [json.loads(Path(f"{folder}/out.{r}").read_text()) for r in range(s.ranks)]
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        parts = [found[name] for found in ranks]
        row: dict[str, Any] = {key: [p[key] for p in parts] for key in ("sent", "macs")}
        row |= {"error": max(p["error"] for p in parts), "calls": parts[0]["calls"]}
        row["seconds"] = [wall for wall, _ in parts[0]["times"]]
        row["cpu"] = [sum(c for _, c in t) for t in zip(*(p["times"] for p in parts), strict=True)]
        row["formula"] = CONTENDERS[name].formula(s)
        rows[name] = row
        for key, times in (("time", "seconds"), ("cpu", "cpu")):
            pairs = zip(row[times], rows[OWNER][times], strict=True)
            row[key + " ratio"] = statistics.median(a / b for a, b in pairs)
    return rows


def show(rows: dict[str, dict[str, Any]], s: MegatronSettings) -> None:
    """Print one table."""
    print(f"\n{s.dtype}: {len(rows[OWNER]['seconds'])} turns\n")
    titles = ("median ms", "least ms", "time", "cpu", "calls", "MB mean", "MB max", "formula",
              "Gmac max", "Gmac all", "error")  # fmt: skip
    print(f"| {'optimizer':<21} | {' | '.join(titles)} |\n|---|{'--:|' * len(titles)}")
    for name, row in rows.items():
        cells = [f"{1e3 * f(row['seconds']):.0f}" for f in (statistics.median, min)]
        cells += [f"{row[key]:.2f}" for key in ("time ratio", "cpu ratio")] + [f"{row['calls']:g}"]
        sent = (statistics.mean(row["sent"]), max(row["sent"]), row["formula"])
        cells += ["" if x is None else f"{x / 1e6:.2f}" for x in sent]
        cells += [f"{f(row['macs']) / 1e9:.2f}" for f in (max, sum)] + [f"{row['error']:.0e}"]
        line = [cell.rjust(len(title)) for cell, title in zip(cells, titles, strict=True)]
        print(f"| {name:<21} | {' | '.join(line)} |")


def missed(rows: dict[str, dict[str, Any]], s: MegatronSettings) -> list[str]:
    """Where one of ours that is exact is not below a mode of the built-in that is."""
    columns = {"time ratio": float, "calls": float, "sent": max, "macs": max}
    found: list[str] = []
    for name, other in itertools.product(rows, rows):
        mine, theirs = CONTENDERS[name], CONTENDERS[other]
        if mine.ours and mine.period == 1 and theirs.mode in ("duplicated", "distributed"):
            above = [c for c, f in columns.items() if f(rows[name][c]) >= f(rows[other][c])]
            text = f"{s.dtype}: {name} is not below {other} in {', '.join(above)}"
            found += [text] * bool(above)
    return found


def contenders(peers: bool) -> list[str]:
    """Those that are here; the others are named."""
    names = []
    for name, contender in CONTENDERS.items():
        try:
            if contender.ours:
                MuonOptions.from_user({"strategy": contender.mode})
            elif not peers:
                raise ValueError("emerging_optimizers is not there")
            names.append(name)
        except ValueError as error:
            print(f"left out: {name}: {error}")
    return names


def main(
    peers: Annotated[str, typer.Option(help="folder of the other packages")] = "/tmp/peers",
    dtypes: Annotated[str, typer.Option(help="comma-separated")] = "float32,bfloat16",
    seconds: Annotated[float, typer.Option(help="of measuring a table, at least 3 turns")] = 100,
    ranks: int = 4,
    layers: int = 4,
    hidden: int = 512,
    ffn: int = 1408,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
) -> None:
    """Measure and print a table per dtype."""
    os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    sys.path.append(peers)
    names = contenders(importlib.util.find_spec("emerging_optimizers") is not None)
    results = {}
    for dtype in dtypes.split(","):
        s = MegatronSettings(ranks, layers, hidden, ffn, dtype, seconds)
        load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
        print(f"\n{ranks} ranks on {os.cpu_count()} cores, load {load};"
              f" {sum(m * n for m, n, _ in s.matrices(1)):,} numbers in matrices")  # fmt: skip
        rows = run(names, s, peers)
        show(rows, s)
        print(*missed(rows, s), sep="\n")
        results[dtype] = {"settings": asdict(s), "load": load, "rows": rows}
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
