"""Runs of launch/pretrain.py that are killed, or told to end, at a named phase or at random."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from spectral_dist.launch import checkpoints, files
from tests.faults.forked import Forked, launcher, preload
from tests.launch.jobs import ROOT, STEPS, LaunchedJob
from tests.launch.torch_runs import write
from tests.support import harness

DRIVER = str(ROOT / "tests/faults/driver.py")
ENGINES = ("ddp", "fsdp", "ds1", "ds2", "ds3", "megatron")
MUON = {"type": "SpectralMuon", "params": {"lr": 0.01, "weight_decay": 0.1}}
HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun is to hand on to its ranks; the last one is no default of it."""
MARK = "SPECTRAL_DIST_TRIAL"
"""What all processes of a run have in their environment, and no others."""


@dataclass
class StruckJob(LaunchedJob):
    """A job whose ranks can be struck."""

    def options(self, engine: str, steps: int = STEPS) -> list[str]:
        """Return the options of ddp, fsdp, megatron or, for a ZeRO stage, ds1 to ds3; Muon."""
        if engine.startswith("ds"):
            return ["--config", str(self.config(engine, int(engine[2:]), MUON, steps))]
        optimizer: dict[str, Any] = {"type": "Muon", "lr": 0.01}
        keys: dict[str, Any] = {"steps": steps}
        if engine == "megatron":
            optimizer["type"] = "spectral_muon"
            keys |= {"tensor_parallel": 2, "use_distributed_optimizer": True}
        config = write(self.folder, optimizer, engine, **keys)
        return ["--engine", engine, "--config", str(config)]

    def start(
        self,
        out: str,
        *options: str,
        ranks: int = 2,
        restarts: int = 0,
        fault: dict[str, Any] | None = None,
        forked: bool = False,
    ) -> LaunchedRun:
        """Begin a run; `fault` is of driver.Fault, `forked`: by forked.py."""
        elastic = ["--standalone", "--nproc_per_node", str(ranks)]
        elastic += ["--max_restarts", str(restarts), "--signals_to_handle", HANDED_ON]
        command = [DRIVER, *self.arguments(out), *options]
        if ranks > 1:
            command = [*elastic, *command]
        env = {**self.env, MARK: str(self.folder / out)}
        if fault:
            env["FAULT"] = json.dumps({"once": str(self.folder / f"{out}.struck"), **fault})
        printed = self.folder / f"{out}.txt"
        metrics = self.folder / out / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process: subprocess.Popen[bytes] | Forked
        if forked:
            preload("megatron" if "megatron" in options else "others")
            process = launcher(command, env, self.folder, printed)
        else:
            torchrun = ["-m", "torch.distributed.run"] if ranks > 1 else []
            with printed.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, *torchrun, *command],
                    env=env,
                    cwd=self.folder,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
        return LaunchedRun(process, self.folder / out, printed, before)

    def once(self, out: str, *options: str, **keys: Any) -> tuple[int, str]:
        """A run from its start to its end."""
        return self.start(out, *options, **keys).finish()

    def latest(self, out: str) -> str:
        """What `latest` names."""
        return (self.folder / out / "checkpoints/latest").read_text()

    def check(self, out: str, losses: list[float]) -> int:
        """Assert that what a run left can be gone on with; the step of what is to be taken, or 0.

        `losses` are those of a run that nobody has disturbed.
        """
        folder = self.folder / out / "checkpoints"
        for path in checkpoints.steps(folder):
            if (path / checkpoints.MANIFEST).exists():
                whole = checkpoints.read(path)
                digests = files.hashes([path / name for name in whole.files])
                assert digests == [digest for _, digest in whole.files.values()], path
                assert whole.run["step"] == int(path.name.removeprefix("step_"))
        checkpoint, notes = checkpoints.find(folder)
        if checkpoint is None:
            return 0
        assert notes == []  # what `latest` names is whole
        step = int(checkpoint.run["step"])
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        for line in lines[:-1]:
            json.loads(line)
        records = [r for r in map(_record, lines) if r["part"] == "train" and r["step"] <= step]
        assert [record["step"] for record in records] == list(range(1, step + 1))
        assert [record["loss"] for record in records] == losses[:step]
        return step


def _record(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:  # the last one, which a kill has cut
        return {"part": ""}


@dataclass
class LaunchedRun:
    """A launcher and its ranks: what they have printed, and when `metrics.jsonl` was last new."""

    process: subprocess.Popen[bytes] | Forked
    out: Path
    printed: Path
    before: int

    def finish(self, timeout: float = 240) -> tuple[int, str]:
        """Wait for its end: exit status, and what it printed."""
        try:
            status = self.process.wait(timeout * harness.busy())
        except subprocess.TimeoutExpired:
            print(self.text())
            raise
        finally:
            self.kill()  # what the launcher has left, too
        return status, self.text()

    def text(self) -> str:
        """What it has printed."""
        return self.printed.read_text(errors="replace") if self.printed.exists() else ""

    def everyone(self) -> list[int]:
        """All processes, those that have lost their launcher as well."""
        return [each.pid for each in psutil.process_iter() if self._has(each)]

    def _has(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            forked = self.process.pid in (process.pid, os.getsid(process.pid))
            return forked or process.environ().get(MARK) == str(self.out)
        except (psutil.Error, OSError):
            return False

    def ranks(self) -> list[int]:
        """Ranks that the launcher has now, in their order."""
        try:
            children = psutil.Process(self.process.pid).children()
            lines = {each.pid: " ".join(each.cmdline()) for each in children}
        except psutil.Error:
            return []
        return sorted(pid for pid, line in lines.items() if "resource_tracker" not in line)

    def kill(self) -> None:
        """SIGKILL to the launcher and all that it has started, at once."""
        while everyone := self.everyone():
            for pid in everyone:
                send(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait(60)

    def training(self) -> bool:
        """Whether its log is open, just before the first step."""
        path = self.out / "metrics.jsonl"
        return path.exists() and path.stat().st_mtime_ns != self.before

    def trained(self) -> int:
        """The last step that its log has."""
        path = self.out / "metrics.jsonl"
        records = map(_record, path.read_text().splitlines() if path.exists() else [])
        return max((record["step"] for record in records if record["part"] == "train"), default=0)

    def until(self, met: Callable[[], bool], timeout: float = 240) -> bool:
        """Wait until something is so; False: the run ended before."""
        end = time.monotonic() + timeout * harness.busy()
        while not met():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.text())
            time.sleep(0.01)
        return self.process.poll() is None

    def pause(self, seconds: float) -> bool:
        """Let it go on for so long; False: it ended before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)


def send(pid: int, number: int) -> None:
    """Signal a process, if there still is one."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
