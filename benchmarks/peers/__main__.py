"""Muons of other packages and ours on the same ranks, in turns: bytes, calls, memory and time.

    pip install --no-deps --ignore-requires-python --target DIR muon-fsdp2==0.3.0 \\
        muonium==0.2.0 dtensor-muon==0.1.0 heavyball==3.2.1 emerging-optimizers==0.3.0
    git clone https://github.com/microsoft/dion DIR/dion
    git clone https://github.com/X-Square-Robot/dmuon DIR/dmuon
    .venv/bin/python -m benchmarks.peers --peer-dir DIR --json peers.json --markdown peers.md

A case is a layout and a model (models.py). All contenders of a case (contenders.py) live on the
same gloo ranks of one thread, each with a model of its own, and take turns. An iteration is
forward, backward and step; every rank has the same tokens, so that P ranks have one process's
gradients. What is not there is named.

MB over AdamW: sent by a rank in an iteration, the mean of ranks, counted at torch's dispatcher
(dispatched_traffic.py), less AdamW's in the same layout. calls: collectives over AdamW's. matrices:
orthogonalized in an iteration. state: the optimizer's, of the rank that has most. peak: bytes of
tensors alive at once in step() above what was before it (of DeepSpeed: in an iteration), of the
rank with most. As one process: the largest difference of the update of two steps from that of the
same contender in one process, over its RMS. Times: medians; ratios to ours, medians of those of the
same turn. Only 2 ranks are timed: here, and on two hosts of one rank each, on a link of --rate,
which launch/hosts.sh makes (as root).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.peers.contenders import OURS
from benchmarks.peers.job import Job
from benchmarks.peers.models import FORMS
from benchmarks.peers.start import ROOT, run, two_hosts, why_no_hosts
from benchmarks.peers.tables import document

PLAIN = ("homogeneous", "gqa")
CASES = [
    *(f"fsdp/{model}" for model in FORMS),
    *(f"{layout}/{model}" for layout in ("ddp", "zero1", "zero2", "zero3") for model in PLAIN),
    "megatron/tensor parallel",
]
"""layout/model."""
BASES = ("AdamW", OURS)
"""Contenders that all others are compared with."""
WEAK = ("fsdp/homogeneous",)


def paths(folder: Path | None) -> list[str]:
    """Return the entries of sys.path for a folder of packages and of checkouts."""
    if folder is None:
        return []
    checkouts = [str(p.parent.parent) for p in folder.glob("*/*/__init__.py")
                 if p.parent.name == p.parent.parent.name]  # fmt: skip
    return [*checkouts, str(folder)]


def kits(cases: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Return layouts and models by what the processes must have."""
    found: dict[str, list[tuple[str, str]]] = {}
    for case in cases:
        layout, model = case.split("/")
        needs = {"zero": "DeepSpeed", "mega": "Megatron"}.get(layout[:4], "torch")
        found.setdefault(needs, []).append((layout, model))
    return found


def machine() -> str:
    """Return what has measured: commit, torch, processor and its cores."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.strip()  # fmt: skip
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return f"commit {commit}, torch {torch.__version__}, {len(names)} x {names[0]}"


def write(rows: list[dict[str, Any]], json_path: Path | None, markdown: Path | None) -> None:
    """Write what has been measured so far."""
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if markdown is not None:
        markdown.write_text(f"`{machine()}`\n\n{document(rows)}")


def main(
    peer_dir: Annotated[Path | None, typer.Option(help="folder of the other packages")] = None,
    cases: Annotated[str, typer.Option(help="layout/model, comma-separated")] = ",".join(CASES),
    ranks: Annotated[str, typer.Option(help="comma-separated")] = "1,2,4,8",
    names: Annotated[str, typer.Option(help="of contenders, semicolon-separated")] = "",
    seconds: Annotated[float, typer.Option(help="of timing a case, at least 3 turns; 0: none")] = 8,
    rate: Annotated[str, typer.Option(help="of the link of two hosts; '': no hosts")] = "1gbit",
    tiny: Annotated[bool, typer.Option(help="models as small as they can be")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all rows here")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables here")] = None,
) -> None:
    """Measure, and print the tables."""
    begin = time.monotonic()
    counts = sorted({1, *map(int, ranks.split(","))})  # one process is the reference
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen_names = [*BASES, *names.split(";")] if names else []
        common = Job(1, [], folder, paths(peer_dir), tiny=tiny, names=chosen_names)

        def add(link: str, job: Job) -> None:
            found = run(job, link != "one host")
            rows.extend({**row, "link": link} for row in found)
            elapsed = f"{time.monotonic() - begin:5.0f} s"
            print(f"{elapsed}  {link}, {job.ranks} ranks, scale {job.scale}", flush=True)
            write(rows, json_path, markdown)

        for chosen in kits(cases.split(",")).values():
            for count in counts:
                job = replace(common, ranks=count, cases=chosen)
                add("one host", replace(job, seconds=seconds if count == 2 else 0))
                weak = [c for c in chosen if "/".join(c) in WEAK]
                if weak and count > 1:
                    add("one host", replace(job, cases=weak, scale=count))
        if rate and (why := why_no_hosts()):
            print(f"no two hosts: {why}")
        elif rate:
            with two_hosts(rate):
                for chosen in kits(cases.split(",")).values():
                    add(
                        f"two hosts, {rate}",
                        replace(common, ranks=2, cases=chosen, seconds=seconds),
                    )
    print(document(rows))


if __name__ == "__main__":
    typer.run(main)
