"""Every launch template starts a job over two hosts, and its losses are those on one."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.hosts.conftest import SCRIPT
from tests.launch.jobs import ROOT, LaunchedJob, mpi_or_skip

pytestmark = pytest.mark.slow
STEPS = 12
SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "1", "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip


def template(name: str, place: tuple[str, ...]) -> list[str]:
    """Return the command that runs a template on one host, or on each."""
    return ["bash", str(SCRIPT), *place, "bash", str(ROOT / "launch" / name)]


def on_one_host(job: LaunchedJob, engine: str, *options: str) -> list[float]:
    """Return the losses of two ranks under torchrun, without hosts."""
    shipped = "deepspeed/zero2.json" if engine == "deepspeed" else "torch/muon.yaml"
    config = ["--engine", engine, "--config", str(ROOT / "configs" / shipped)]
    job.ranks(2, "one", *config, *options)
    return job.losses("one")


@pytest.mark.parametrize(
    "name", ["torchrun.sh", "mpirun.sh", "deepspeed.sh", "slurm.sbatch", "megatron.sh"]
)
def test_a_template_over_two_hosts(job: LaunchedJob, name: str) -> None:
    """Real launchers; what starts processes elsewhere (ssh, pdsh, srun) is a stand-in."""
    engine = "deepspeed" if name == "deepspeed.sh" else "fsdp"
    job.env["ENGINE"] = engine
    place: tuple[str, ...] = ("on", "0")
    if name == "mpirun.sh":
        mpi_or_skip()
        job.env |= {"RANKS": "2", "HOSTFILE": str(job.folder / "hosts")}
        (job.folder / "hosts").write_text("node0:1\nnode1:1\n")
    elif name == "deepspeed.sh":
        job.env["HOSTFILE"] = str(job.folder / "hosts")
        (job.folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
        # what DeepSpeed hands on to other hosts, beside PYTHON*
        handed = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "SPECTRAL_DIST_CACHE", "TERMINAL_WIDTH")
        lines = [f"{variable}={job.env[variable]}\n" for variable in handed]
        (job.folder / ".deepspeed_env").write_text("".join(lines))
    elif name == "slurm.sbatch":
        job.env |= SLURM
    else:
        place = ("each",)
        shipped = ROOT / "configs/torch/muon.yaml"  # in place of megatron-core's, which wants GPUs
        job.env |= {"CONFIG": str(shipped), "SEQ_LEN": "16"}
    job.run(template(name, place), "two", "--stop-at", "4")
    assert job.summary("two")["ranks"] == 2
    assert job.losses("two") == on_one_host(job, engine, "--stop-at", "4")


def test_links_have_the_rate_and_go_nowhere_else(job: LaunchedJob) -> None:
    seen = {}
    for name, command in {"links": "tc qdisc show dev eth0", "routes": "ip route"}.items():
        line = ["bash", str(SCRIPT), "on", "1", "bash", "-c", command]
        seen[name] = subprocess.check_output(line, env=job.env, text=True)
    assert " rate 1Gbit " in seen["links"]
    assert seen["routes"].split()[0] == "10.77.0.0/24"
    assert len(seen["routes"].splitlines()) == 1


def start(job: LaunchedJob, host: int, *options: str) -> subprocess.Popen[str]:
    """Start torchrun's template on a host."""
    command = [*template("torchrun.sh", ("on", str(host))), *job.arguments("two"), *options]
    with (job.folder / f"log{host}").open("a") as log:
        return subprocess.Popen(
            command, env=job.env, cwd=job.folder, stdout=log, stderr=log, text=True
        )


def wait_for_step(job: LaunchedJob, step: int) -> None:
    metrics, ends = job.folder / "two/metrics.jsonl", time.monotonic() + 180
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < ends, (job.folder / "log0").read_text()
        time.sleep(0.1)


def test_a_host_dies_and_another_takes_its_place(job: LaunchedJob, hosts: dict[str, str]) -> None:
    """All that runs on it is killed at once, in the middle of the run."""
    job.env |= {"ENGINE": "fsdp", "MAX_RESTARTS": "3"}
    options = ("--stop-at", str(STEPS), "--save-every", "2", "--resume", "auto")
    first, lost = start(job, 0, *options), start(job, 1, *options)
    wait_for_step(job, 5)
    name = f"{hosts['HOSTS_PREFIX']}1"
    listed = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
    )
    for pid in map(int, listed.stdout.split()):
        os.kill(pid, signal.SIGKILL)
    assert lost.wait(timeout=60)
    assert not (job.folder / "two/summary.json").exists()
    again = start(job, 1, *options)
    ended = first.wait(timeout=240), again.wait(timeout=60)
    assert ended == (0, 0), (job.folder / "log0").read_text()
    assert job.losses("two") == on_one_host(job, "fsdp", "--stop-at", str(STEPS))
