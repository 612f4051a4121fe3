"""Bytes of optimizer state and gradients per rank, against ranks and r; temporaries of a step.

    .venv/bin/python -m benchmarks.memory_scaling --png memory.png --json memory.json

Runs tests/support/memory/scaling.py, under torchrun on gloo, at every number of ranks (8 take some
minutes on two cores). What it measures is exact and the same on any machine: bytes, no times. They
are of a small Llama in float32; the script fails where they are not what
tests/support/memory/formula.py says.
POET's blocks are a third of its sides: of a large model they are a tenth and less.

state: of the rank that has the most, all parameters, over the parameters' number: in bytes per
parameter, so that it is about that of a large model; in SUMO's r counts over the short side, here
63 and less. ZeRO 2 is as ZeRO 1. temporaries: of a step, of the rank that takes the most, in
buckets of its own: all of ``bucket_mb`` if that is a matrix for each rank, else these matrices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.support.memory.formula import FLOAT
from tests.support.memory.scaling import OPTIMIZERS, MemoryCase

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"ddp": "DDP", "fsdp": "FSDP2", **{f"zero{k}": f"ZeRO {k}" for k in range(4)}}
TITLES = {"adamw": "AdamW", "muon": "Muon", "polargrad": "PolarGrad", "root": "ROOT",
          "poet": "POET"}  # fmt: skip
Found = dict[tuple[MemoryCase, int], list[dict[str, Any]]]
"""(case, ranks) -> of each rank"""


def measure(world: int, *arguments: str) -> Found:
    """One torchrun of the script."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [*torchrun, f"--nproc_per_node={world}", "-m", "tests.support.memory.scaling"]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
            "TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        done = subprocess.run(
            [*command, "--out", str(out), *arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stdout[-5000:])
        return {(MemoryCase(**f["case"]), world): f["ranks"] for f in json.loads(out.read_text())}


def state(ranks: Sequence[dict[str, Any]]) -> float:
    """Bytes per parameter, of the rank that has the most."""
    most: int = max(sum(rank["state"].values()) for rank in ranks)
    return most / int(ranks[0]["weights"])


def gradients(ranks: Sequence[dict[str, Any]]) -> float:
    """Bytes per parameter, of the rank that has the most."""
    return max(rank["gradients"] for rank in ranks) / int(ranks[0]["weights"])


def reduced(ranks: Sequence[dict[str, Any]]) -> float:
    """Bytes per parameter that a rank hands to the reduction of gradients in a step."""
    return max(rank["reduced"] for rank in ranks) / int(ranks[0]["weights"])


def temporaries(ranks: Sequence[dict[str, Any]]) -> float:
    """Largest buckets, of the rank that takes the most."""
    return max(rank["peak"] / FLOAT / max(rank["buckets"].values()) for rank in ranks)


def title(case: MemoryCase) -> str:
    """Of a row or a line."""
    if case.optimizer == "sumo":
        return f"SUMO, r = {case.rank}" + ", refresh" * case.refresh
    return TITLES[case.optimizer]


def table(found: Found, worlds: Sequence[int], layouts: Sequence[str], what: Any) -> list[str]:
    """Rows of Markdown: optimizers by layout, numbers of ranks across."""
    lines = [f"| | | {' | '.join(f'{w} ranks' if w > 1 else '1 rank' for w in worlds)} |"]
    lines.append(f"|---|---|{'--:|' * len(worlds)}")
    for layout in layouts:
        cases = dict.fromkeys(case for case, _ in found if case.layout == layout)
        for case in cases:
            if case.refresh and what is state:
                continue
            if case.optimizer in ("adamw", "poet") and what is temporaries:
                continue  # torch's takes of its largest tensor, not of buckets
            if case.optimizer not in ("adamw", "poet") and what in (gradients, reduced):
                continue  # as AdamW's
            cells = [f"{what(found[case, world]):.2f}" for world in worlds]
            lines.append(f"| {NAMES[layout]} | {title(case)} | {' | '.join(cells)} |")
    return lines


def plot(found: Found, by_rank: Found, worlds: Sequence[int], png: Path) -> None:
    """Two panels: state of a rank against ranks under FSDP2 and DDP; and against r under FSDP2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    shown = {"polargrad", "root"}  # as Muon
    colors: dict[str, str] = {}
    for case in dict.fromkeys(case for case, _ in found):
        if case.layout not in ("ddp", "fsdp") or case.optimizer in shown or case.refresh:
            continue
        values = [state(found[case, world]) for world in worlds]
        color = colors.setdefault(case.optimizer, f"C{len(colors)}")
        dashes = "--" if case.layout == "ddp" else "-"
        label = f"{title(case)}, {NAMES[case.layout]}"
        left.plot(worlds, values, dashes, color=color, marker="o", markersize=4, label=label)
    left.set(xlabel="ranks", ylabel="bytes of state per parameter, on a rank", xticks=worlds)
    left.set_xscale("log", base=2)
    left.set_xticks(worlds, [str(world) for world in worlds])
    for number, world in enumerate(worlds):
        points = {c.rank: state(r) for (c, w), r in by_rank.items() if w == world}
        if not points:
            continue
        style: dict[str, Any] = {"alpha": 1 - 0.2 * number}
        label = f"SUMO, {world} rank" + "s" * (world > 1)
        right.plot(*zip(*sorted(points.items()), strict=True), color=colors["sumo"], marker="o",
                   markersize=4, label=label, **style)  # fmt: skip
        muon = state(found[MemoryCase("fsdp", "muon"), world])
        label = "Muon, as many ranks" if not number else ""
        right.axhline(muon, color=colors["muon"], linewidth=0.8, label=label, **style)
    right.set(xlabel="r", xticks=sorted({case.rank for case, _ in by_rank}))
    for axes in (left, right):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=150)


def main(
    png: Annotated[Path, typer.Option(help="plot to write")] = Path("memory.png"),
    worlds: Annotated[str, typer.Option(help="numbers of ranks")] = "1,2,4,8",
    ranks: Annotated[str, typer.Option(help="SUMO's r of the second panel")] = "2,4,8,12,16,20",
    layouts: Annotated[str, typer.Option()] = "ddp,fsdp,zero0,zero1,zero3",
    json_path: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
) -> None:
    """Measure, print the tables, plot."""
    counts = [int(world) for world in worlds.split(",")]
    found: Found = {}
    by_rank: Found = {}
    for world in counts:
        found |= measure(world, "--layout", layouts, "--optimizer", ",".join(OPTIMIZERS))
        if "sumo" in OPTIMIZERS:
            several = ("--layout", "fsdp", "--optimizer", "sumo", "--rank", ranks)
            by_rank |= {k: v for k, v in measure(world, *several).items() if not k[0].refresh}
    one = next(iter(found.values()))[0]["numbers"]
    share = one["matrix"] / sum(one.values())
    print(f"{sum(one.values()):,} parameters in float32, {100 * share:.1f}% of them in matrices")
    print("\nbytes of state per parameter, on the rank that has the most\n")
    print(*table(found, counts, layouts.split(","), state), sep="\n")
    print("\nbytes of gradients per parameter, on the rank that has the most\n")
    print(*table(found, counts, layouts.split(","), gradients), sep="\n")
    print("\nbytes per parameter that a rank hands to the reduction of gradients in a step\n")
    counted = [layout for layout in layouts.split(",") if layout in ("ddp", "fsdp")]
    print(*table(found, counts, counted, reduced), sep="\n")
    print("\ntemporary memory of a step, in the largest of its buckets\n")
    print(*table(found, counts, layouts.split(","), temporaries), sep="\n")
    if by_rank:
        print("\nbytes of state per parameter by SUMO's r, FSDP2\n")
        print(*table(by_rank, counts, ["fsdp"], state), sep="\n")
    plot(found, by_rank, counts, png)
    if json_path is not None:
        everything = [
            {"case": vars(case), "world": world, "ranks": of_ranks}
            for both in (found, by_rank)
            for (case, world), of_ranks in both.items()
        ]
        json_path.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    typer.run(main)
