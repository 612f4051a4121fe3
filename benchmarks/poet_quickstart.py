"""The quickstart's job with POET beside Muon and AdamW, at equal tokens: loss, memory, traffic.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.poet_quickstart [--data code]

Model, corpus, tokenizer, batches, schedule and evaluation are launch/'s own, as in
benchmarks.sumo_quickstart, in one process with seed 0; clipping is the job's (1.0) for all.
Embeddings, head and norms are on AdamW at lr .006 in POET's runs, and at the lr of the matrices in
the others. The job has 120 steps, so POET merges every 20 or 40; its betas and eps are its own.
Each contender gets lrs a factor of 2 apart, and more while the best is the last.

Beside bits per byte, of the third step of a job of 2 ranks: bytes of gradients; of optimizer state;
the most that the step takes for a moment beside them (tests/support/memory/live.py); and the bytes
that each of 2 ranks sends under DistributedDataParallel in one step, counted by a communication
hook and the optimizer's own meter (an all-reduce of n bytes sends 2 (P - 1) / P n). All of these
are exact and the same on every machine.

A run takes about three minutes alone on a core. Each is a line of the file --json; what is there is
not run again, and --show prints it all without a run.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from benchmarks import sumo_quickstart
from benchmarks.sumo_quickstart import ROOT, QuickstartContender, read, state_bytes
from spectral_dist import poet
from spectral_dist.launch import llama, ranks
from tests.support.memory.live import Live

SETTINGS = {f.name for f in fields(poet.Settings)}
REST = {"scalar_lr": 0.006}
LARGE = {"block": 64, "blocks": {"q_proj|k_proj|v_proj|o_proj": 192, "gate|up": [192, 256],
                                 "down": [256, 192]}}  # fmt: skip
"""The largest blocks of this model: all of a side of 192, half of one of 512."""
CONTENDERS = (
    QuickstartContender("AdamW", "AdamW", 0.003),
    QuickstartContender("Muon", "Muon", 0.012),
    QuickstartContender("POET b 64", "POET", 0.002, {"block": 64, "merge_every": 20, **REST}),
    QuickstartContender("POET b 64 T 40", "POET", 0.002, {"block": 64, "merge_every": 40, **REST}),
    QuickstartContender(
        "POET b 64 normalized", "POET", 0.002,
        {"block": 64, "merge_every": 20, "init": "normalized", **REST},
    ),
    QuickstartContender("POET b 192 and 256", "POET", 0.001, {**LARGE, "merge_every": 20, **REST}),
)  # fmt: skip


def build(
    model: nn.Module, contender: QuickstartContender, adam: Mapping[str, Any], wrap: Any
) -> Any:
    """(model, optimizer): POET's is converted, and then it is wrapped."""
    options = dict(contender.options)
    if contender.kind == "POET":
        settings = {name: options.pop(name) for name in list(options) if name in SETTINGS}
        poet.convert(model, **settings)
    wrapped, lr = wrap(model), contender.lr
    if contender.kind != "POET":
        return wrapped, sumo_quickstart.build(contender.kind, wrapped, lr, adam, options)
    with contextlib.redirect_stderr(io.StringIO()):  # the table of what is rotated
        groups = spectral_dist.param_groups(wrapped)
    decay = adam["weight_decay"]  # betas and eps are its own
    return wrapped, spectral_dist.POET(groups, lr=lr, weight_decay=decay, **options)


class PoetEngine(sumo_quickstart.QuickstartEngine):
    """Of one contender."""

    def make_optimizer(self) -> Any:
        """The contender's, of a converted model if it is POET."""
        options = self.config.options
        adam = {name: getattr(options, name) for name in ("betas", "eps", "weight_decay")}
        self.model, optimizer = build(self.model, self.contender, adam, lambda model: model)
        return optimizer


class PoetRuns(sumo_quickstart.QuickstartRuns):
    """Runs of these contenders."""

    engine = PoetEngine

    def measure(self, contender: QuickstartContender) -> dict[str, float]:
        """Bytes of one step of this job's model."""
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (contender, self.model, folder), nprocs=2)
            return dict(torch.load(Path(folder) / "found.pt"))


def _rank(rank: int, contender: QuickstartContender, model: Any, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    adam = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    wrapped, optimizer = build(llama.build(model, 0), contender, adam, DistributedDataParallel)
    reduced = 0

    def count(state, bucket):  # type: ignore[no-untyped-def]  # torch checks annotations by identity
        nonlocal reduced
        reduced += bucket.buffer().nbytes
        found = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return found.then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, count)
    for step in range(3):  # state is made in the first
        sent = getattr(optimizer, "comm_bytes", 0)
        reduced = 0
        tokens = torch.randint(4096, (1, 64), generator=torch.Generator().manual_seed(step))
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        gradients = sum(p.grad.nbytes for p in wrapped.parameters() if p.grad is not None)
        with Live() as live:
            optimizer.step()
        optimizer.zero_grad()
    found = {
        "gradients": gradients,
        "state": state_bytes(optimizer, wrapped.module)["all"],
        "temporary": live.peak,
        "sent": reduced + getattr(optimizer, "comm_bytes", 0) - sent,  # 2 (P - 1) / P is 1 here
        "weights": sum(p.nbytes for p in wrapped.parameters()),
    }
    if rank == 0:
        torch.save(found, os.path.join(folder, "found.pt"))
    dist.destroy_process_group()


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each contender, bytes in MB."""
    titles = ("optimizer", "lr", "bits per byte", "gradients", "state", "temporary", "sent")
    rows = [titles, ("---", *["--:"] * (len(titles) - 1))]
    for r in records:
        sizes = [f"{r['bytes'][key] / 1e6:.2f}" for key in titles[3:]]
        rows.append((r["name"], f"{r['lr']:g}", f"{r['bits_per_byte']:.3f}", *sizes))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(
    only: Annotated[str, typer.Option(help="comma-separated names; all")] = "",
    path: Annotated[
        Path, typer.Option("--json", help="a line for each run; those in it are not run again")
    ] = Path("runs/poet_quickstart.jsonl"),
    shown: Annotated[bool, typer.Option("--show", help="all that is in the file, and no run")] = (
        False
    ),
    data: Annotated[
        list[str] | None, typer.Option(help="as pretrain.py's; default: its default corpus")
    ] = None,
) -> None:
    """Search, run, measure, and print the table."""
    if shown:
        print(*(sumo_quickstart.line(r) for r in read(path)), sep="\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = PoetRuns(path, ROOT / "configs/models/quickstart.json", "", data)
    records = []
    for contender in CONTENDERS:
        if not only or contender.name in only.split(","):
            best = bench.run(bench.best_lr(contender))
            records.append({**best, "bytes": bench.measure(contender)})
    ranks.stop()
    print(table(records))


if __name__ == "__main__":
    typer.run(main)
