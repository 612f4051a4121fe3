"""Small runs of launch/pretrain.py in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
STEPS = 6
IN_TURN = """
import json, os, sys
from typer.testing import CliRunner
from spectral_dist.launch import pretrain, ranks
environment, found = dict(os.environ), []
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(pretrain.app, arguments)
    found.append([done.exit_code, f"{done.output}{done.exception or ''}"])
    ranks.stop()
    os.environ.clear()
    os.environ.update(environment)
print(json.dumps(found))
"""


@dataclass
class LaunchedJob:
    """A tiny model, tiny texts, and an environment that leaves the user's caches alone."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    script_of_ranks: Sequence[str] = (str(ROOT / "launch/pretrain.py"),)

    def __post_init__(self) -> None:
        data = self.folder / "data"
        data.mkdir()
        for i in range(60):
            words = " ".join(f"w{(i * 13 + k * k) % 97}" for k in range(80))
            (data / f"{i}.txt").write_text(words, encoding="utf-8")
        (self.folder / "model.json").write_text(json.dumps(MODEL))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TERMINAL_WIDTH": "500",  # errors in one line
            "PYTHONPATH": str(ROOT),
            "SPECTRAL_DIST_CACHE": str(self.folder / "cache"),
        }

    def config(
        self, name: str, stage: int, optimizer: dict[str, object], steps: int = STEPS
    ) -> Path:
        """A DeepSpeed JSON: the shipped one at this stage, with another optimizer and length."""
        shipped = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
        shipped["optimizer"] = optimizer
        shipped["train_batch_size"] = 8
        shipped["gradient_accumulation_steps"] = 2
        shipped["scheduler"]["params"] |= {"total_num_steps": steps, "warmup_num_steps": 2}
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(shipped))
        return path

    def arguments(self, out: str) -> list[str]:
        """What every run is given."""
        folder = self.folder
        given = ["--model", folder / "model.json", "--data", folder / "data", "--out", folder / out]
        return [*map(str, given), "--seq-len", "16", "--eval-every", "3", "--eval-batches", "2"]

    def run(self, command: Sequence[str], out: str, *extra: str, fails: bool = False) -> str:
        """Run and return what was printed; `fails` says whether it has to."""
        done = subprocess.run(
            [*command, *self.arguments(out), *extra],
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def alone(self, out: str, *extra: str, fails: bool = False) -> str:
        """One process."""
        return self.run(
            [sys.executable, str(ROOT / "launch/pretrain.py")], out, *extra, fails=fails
        )

    def in_turn(self, *runs: Sequence[str]) -> list[str]:
        """Runs, each `out` and options, one after the other in one process; what each printed.

        Those that have to fail are marked by a "!" before `out`.
        """
        commands = [[*self.arguments(out.lstrip("!")), *options] for out, *options in runs]
        done = subprocess.run(
            [sys.executable, "-c", IN_TURN, json.dumps(commands)],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        for (out, *_), (status, printed) in zip(runs, found, strict=True):
            assert (status != 0) == out.startswith("!"), printed
        return [printed for _, printed in found]

    def ranks(self, count: int, out: str, *extra: str, fails: bool = False) -> str:
        """`count` ranks under torchrun."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = ["--nproc_per_node", str(count), *self.script_of_ranks]
        return self.run([*torchrun, *script], out, *extra, fails=fails)

    def script(self, name: str) -> str:
        """What a script of launch/ prints."""
        command = ["bash", str(ROOT / "launch" / name)]
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def losses(self, out: str, part: str = "train") -> list[float]:
        """Losses of all steps in order."""
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["part"] == part]
        steps = [record["step"] for record in records]
        assert steps == sorted(set(steps))
        return [record["loss"] for record in records]

    def summary(self, out: str) -> dict[str, object]:
        """summary.json."""
        return dict(json.loads((self.folder / out / "summary.json").read_text()))


def mpi_or_skip() -> str:
    """The mpiexec of this environment."""
    pytest.importorskip("mpi4py")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no MPI in this environment: launch/test.sh installs one")
    return str(mpiexec)
