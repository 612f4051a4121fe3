"""Runs of launch/pretrain.py that are killed at a named phase or at a random instant."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.launch.jobs import ROOT, Job
from tests.launch.torch_runs import write

DRIVER = str(ROOT / "tests/faults/driver.py")
MUON = {"type": "SpectralMuon", "params": {"lr": 0.01, "weight_decay": 0.1}}


@dataclass
class Trial(Job):
    """A job whose ranks can be struck."""

    def options(self, engine: str, steps: int = 6) -> list[str]:
        """Of ddp, fsdp or ds1, ds3 for a stage of ZeRO; Muon."""
        if engine.startswith("ds"):
            return ["--config", str(self.config(engine, int(engine[2:]), MUON))]
        config = write(self.folder, {"type": "Muon", "lr": 0.01}, engine, steps=steps)
        return ["--engine", engine, "--config", str(config)]

    def start(
        self,
        out: str,
        *options: str,
        ranks: int = 2,
        restarts: int = 0,
        fault: dict[str, Any] | None = None,
    ) -> subprocess.Popen[str]:
        """Begin a run; `fault` is of driver.Fault."""
        elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        elastic += ["--max_restarts", str(restarts)]
        command = [sys.executable, *(elastic if ranks > 1 else []), DRIVER]
        env = dict(self.env)
        if fault:
            env["FAULT"] = json.dumps({"once": str(self.folder / f"{out}.struck"), **fault})
        return subprocess.Popen(
            [*command, *self.arguments(out), *options],
            env=env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for a run: its exit status, and what it printed."""
        try:
            printed, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            kill_all(process)
            raise
        return process.returncode, printed

    def once(self, out: str, *options: str, **keys: Any) -> tuple[int, str]:
        """A run from its start to its end."""
        return self.finish(self.start(out, *options, **keys))

    def latest(self, out: str) -> str:
        """What `latest` names."""
        return (self.folder / out / "checkpoints/latest").read_text()


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a launcher and all that it has started, at once."""
    launcher = psutil.Process(process.pid)
    everyone = [*launcher.children(recursive=True), launcher]
    for each in everyone:
        try:
            os.kill(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)


def kill_at_random(process: subprocess.Popen[str], run: Path, chance: random.Random) -> bool:
    """Kill a run some time after it has begun to train; False if it ended before."""
    begun = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else 0
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime_ns != begun:
            time.sleep(chance.uniform(0.0, 1.5))
            kill_all(process)
            return True
        time.sleep(0.01)
    process.communicate(timeout=60)
    return False
