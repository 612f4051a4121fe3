"""integrations/torch/mpi.py under a real mpiexec, and what it says when something is missing."""

import json
import os
import subprocess
import sys

import pytest

from spectral_dist.integrations.torch import mpi
from tests.launch.jobs import ROOT, mpi_or_skip

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = f"""
import json, os, torch, torch.distributed as dist
from spectral_dist.integrations.torch import mpi
assert mpi.launched()
mpi.bootstrap()
dist.init_process_group("gloo")
ones = torch.ones(1)
dist.all_reduce(ones)
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, {{name: os.environ[name] for name in {NAMES}}})
dist.destroy_process_group()
for name in {NAMES}:
    del os.environ[name]
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="12345")  # what is set stays
mpi.bootstrap()
if os.environ["RANK"] == "0":
    print(json.dumps([int(ones), everyone, {{name: os.environ[name] for name in {NAMES}}}]))
"""


def _mpiexec() -> list[object]:
    env = {k: v for k, v in os.environ.items() if k not in NAMES}
    env |= {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1"}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [mpi_or_skip(), "-n", "2", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_mpiexec_gives_what_torchrun_would_and_what_is_set_stays() -> None:
    total, everyone, again = _mpiexec()
    assert total == 2
    assert isinstance(everyone, list)
    # Open MPI may number a node's ranks otherwise than the job's.
    assert sorted(env["LOCAL_RANK"] for env in everyone) == ["0", "1"]
    for rank, env in enumerate(everyone):
        assert env["RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "2"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["MASTER_PORT"] == everyone[0]["MASTER_PORT"]
    assert again == everyone[0] | {"MASTER_ADDR": "localhost", "MASTER_PORT": "12345"}


def test_without_mpi4py_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"pip install 'spectral-dist\[mpi\]'"):
        mpi.bootstrap()


def test_launched_knows_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not mpi.launched()
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with monkeypatch.context() as context:
            context.setenv(name, "2")
            assert mpi.launched()


def test_an_mpi4py_of_another_mpi_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        def Get_size(self) -> int:
            return 1

    class Other:
        COMM_WORLD = Alone()

        @staticmethod
        def Get_library_version() -> str:
            return "Other MPI 1.0\nbuilt somewhere"

    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(mpi, "_mpi", lambda: Other)
    with pytest.raises(ValueError, match=r"mpirun started 2 .* mpi4py sees 1.*Other MPI 1\.0\)"):
        mpi.bootstrap()
