"""Starts the ranks of jobs here, or one on each of two hosts that launch/hosts.sh makes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import tables
from benchmarks.peers.job import Job

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ["bash", str(ROOT / "launch/hosts.sh")]
SURROUNDINGS = {
    "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    "DS_ACCELERATOR": "cpu", "HOSTS_PREFIX": "sdpeers", "PYTHONPATH": str(ROOT),
}  # fmt: skip


def why_no_hosts() -> str:
    """Return why there can be no hosts of network namespaces, or ""."""
    if os.geteuid():
        return "it takes root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)}" if missing else ""


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[None]:
    """Have two hosts on links of a rate, which is a word of ``tc``."""
    surroundings = {**os.environ, **SURROUNDINGS}
    try:
        subprocess.run([*HOSTS, "up", "2", rate], check=True, env=surroundings)
        yield
    finally:
        subprocess.run([*HOSTS, "down"], check=True, env=surroundings)


def run(job: Job, on_hosts: bool = False) -> list[dict[str, Any]]:
    """Return a job's rows, each of all its ranks.

    Raises:
        RuntimeError: a rank ended badly; with the last of what it said.
    """
    folder = Path(job.folder)
    spec = folder / f"job{len(list(folder.glob('job*.json')))}.json"
    job.save(spec)
    processes = [start(spec, rank, on_hosts) for rank in range(job.ranks)]
    codes: list[int | None] = [None] * job.ranks
    while None in codes and not any(codes):
        time.sleep(0.1)
        codes = [process.poll() for process in processes]
    if any(codes):
        for process in processes:  # the others would wait for it
            process.kill()
        bad = next(rank for rank, code in enumerate(codes) if code)
        said = Path(f"{spec}.{bad}.log").read_text()[-2000:]
        raise RuntimeError(f"rank {bad} of {job.ranks} ended badly: {said}")
    ranks = [json.loads(Path(f"{spec}.{rank}").read_text()) for rank in range(job.ranks)]
    return [gathered(rows, job.ranks) for rows in zip(*ranks, strict=True)]


def start(spec: Path, rank: int, on_hosts: bool) -> subprocess.Popen[bytes]:
    """Start a rank, which writes what it says beside its job."""
    before = [*HOSTS, "on", str(rank)] if on_hosts else []
    command = [*before, sys.executable, "-m", "benchmarks.peers.job", str(spec), str(rank)]
    with Path(f"{spec}.{rank}.log").open("w") as log:
        return subprocess.Popen(
            command, env={**os.environ, **SURROUNDINGS}, stdout=log, stderr=log, cwd=ROOT
        )


def gathered(rows: tuple[dict[str, Any], ...], ranks: int) -> dict[str, Any]:
    """Return one row of the same row of all ranks."""
    row = {**rows[0], "ranks": ranks}
    if row["failed"]:
        return row
    if row["error"] is not None:
        row["error"] = max(each["error"] for each in rows)
    for key in tables.OF_RANKS:
        if key in row:
            row[key] = [each[key] for each in rows]
    row["mean sent"] = statistics.mean(row["sent"])
    return row
