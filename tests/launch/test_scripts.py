"""The shell scripts parse, pin torch once, and start ranks as they say."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, LaunchedJob, mpi_or_skip

SCRIPTS = sorted((ROOT / "launch").glob("*.sh")) + [ROOT / "launch/slurm.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "common.sh" or "set -euo pipefail" in script.read_text()
    # Slurm reads its own file; common.sh is sourced.
    assert os.access(script, os.X_OK) or script.name in ("common.sh", "slurm.sbatch")


def test_torch_is_pinned_in_one_place() -> None:
    import torch

    pin = torch.__version__.split("+")[0]
    found = [path.name for path in SCRIPTS if pin in path.read_text()]
    assert found == ["common.sh"]
    assert pin not in (ROOT / "setup.cfg").read_text()


SLURM = pytest.param("slurm.sbatch", marks=pytest.mark.slow)  # its command line is below


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh", "mpirun.sh", SLURM])
@pytest.mark.fast_cases("torchrun.sh")
def test_templates_run_two_ranks_here(job: LaunchedJob, name: str) -> None:
    if name == "mpirun.sh":
        mpi_or_skip()
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    job.env |= {
        "PYTHON": sys.executable,
        "MODEL": str(job.folder / "model.json"),
        "OUT": str(job.folder / "a"),
        "MASTER_PORT": str(29600 + os.getpid() % 1000),
    }
    if name == "slurm.sbatch":
        job.env["ENGINE"] = "fsdp"  # and the YAML that is shipped
    else:
        job.env["CONFIG"] = str(job.config("ds", 1, adamw))
    job.run(["bash", str(ROOT / "launch" / name)], "a", "--stop-at", "2")
    summary = job.summary("a")
    assert (summary["ranks"], summary["step"]) == (2, 2)
    assert len(job.losses("a")) == 2
    if name == "slurm.sbatch":
        assert summary["optimizer"] == "Muon"
        # a requeued job goes on by itself
        job.run(["bash", str(ROOT / "launch" / name)], "a", "--stop-at", "3")
        assert len(job.losses("a")) == 3


@pytest.mark.parametrize("name", ["torchrun.sh", "mpirun.sh", "slurm.sbatch"])
@pytest.mark.parametrize("engine", ["", "deepspeed", "ddp", "fsdp"])
def test_command_lines_of_the_engines(name: str, engine: str) -> None:
    """Printed in place of being run; nothing said is DeepSpeed, and each has its configuration."""
    said = {"PYTHON": "echo", "MPIRUN": shutil.which("echo") or "", "OUT": "/nowhere"}
    env = {"PATH": os.environ["PATH"], **said, **({"ENGINE": engine} if engine else {})}
    command = ["bash", str(ROOT / "launch" / name), "--seed", "7"]
    line = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    config = "torch/muon.yaml" if engine in ("ddp", "fsdp") else "deepspeed/zero2.json"
    assert f"launch/pretrain.py --engine {engine or 'deepspeed'} --model " in line
    assert f"configs/models/quickstart.json --config {ROOT}/configs/{config} " in line
    assert line.rstrip().endswith(" --seed 7")
    assert ("--resume auto --grace 120 " in line) == (name == "slurm.sbatch")
    # slurm.sbatch hands torchrun SIGTERM in its place
    assert ("--signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 " in line) == (
        name == "torchrun.sh"
    )


RUN = """#!/usr/bin/env bash
trap 'echo saved; [ "$1" = whole ] && touch "$OUT/summary.json"; exit 1' TERM
echo begun
for i in $(seq 100); do sleep 0.1; done
"""


@pytest.mark.parametrize("end", ["part", "whole"])
def test_slurm_saves_and_requeues_before_its_time_is_over(tmp_path: Path, end: str) -> None:
    """With stand-ins for Slurm's commands and for the run, which ends when it is asked to."""
    stubs = {
        "srun": f'exec "{tmp_path}/run" {end}',
        "scontrol": f'[ "$1" = requeue ] && echo "$@" >>"{tmp_path}/log" || echo node0',
        "scancel": f'echo "$@" >>"{tmp_path}/log"; kill -TERM "$(cat "{tmp_path}/pid")"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    pid = 'echo $$ >"$OUT/pid"\n'
    (tmp_path / "run").write_text(RUN.replace("echo begun\n", f"{pid}echo begun\n"))
    for name in (*stubs, "run"):
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "true", "OUT": str(tmp_path),
        "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node0", "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    command = ["bash", str(ROOT / "launch/slurm.sbatch")]
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGUSR1)
    assert job.stdout.read() == "saved\n"
    assert job.wait(timeout=30) == 1
    job.stdout.close()
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked == ["--signal=TERM 17", *(["requeue 17"] if end == "part" else [])]


def test_other_releases_have_their_tests() -> None:
    """``test.sh --torch X`` and ``--deepspeed X`` run files that are there."""
    show = f'source "{ROOT}/launch/common.sh"; echo $TORCH_TESTS $DEEPSPEED_TESTS'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    files = done.stdout.split()
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name).is_file()] == []
    for option in ("--torch", "--deepspeed"):
        command = ["bash", str(ROOT / "launch/test.sh"), option]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "--torch VERSION" in done.stderr


def test_a_release_that_is_not_found_is_an_error(tmp_path: Path) -> None:
    """Another one on the path would be tested in its place."""
    (tmp_path / "deepspeed-0.1.0.dist-info").mkdir()
    (tmp_path / "deepspeed-0.1.0.dist-info/METADATA").write_text(
        "Name: deepspeed\nVersion: 0.1.0\n"
    )
    check = f'source "{ROOT}/launch/common.sh"; is_installed deepspeed "$1"'
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    for version, code in (("0.1.0", 0), ("0.1.1", 1)):
        command = ["bash", "-c", check, "bash", version]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "deepspeed 0.1.0 would be tested in place of 0.1.1" in done.stderr


def test_quickstart_knows_its_optimizers() -> None:
    script = ROOT / "launch/quickstart.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(script), "moun"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "unknown optimizer 'moun'; did you mean 'muon'? Known: adamw, muon" in done.stderr
