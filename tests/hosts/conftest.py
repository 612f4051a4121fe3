"""Two hosts of network namespaces, and jobs on them; only where these can be made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, LaunchedJob

SCRIPT = ROOT / "launch/hosts.sh"
RATE = "1gbit"


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Make two hosts; what their commands find in the environment."""
    named = {"HOSTS_PREFIX": f"sdtest{os.getpid()}x", "HOSTS_SCRIPT": str(SCRIPT)}
    env = {**os.environ, **named}
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("ip or tc is not installed")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make network namespaces")
    try:
        subprocess.run(["bash", str(SCRIPT), "up", "2", RATE], env=env, check=True)
        yield named
    finally:
        subprocess.run(["bash", str(SCRIPT), "down"], env=env, check=True)


@pytest.fixture
def job(tmp_path: Path, hosts: dict[str, str]) -> LaunchedJob:
    """A tiny run whose environment has the hosts, and stand-ins for what goes between them."""
    job = LaunchedJob(tmp_path)
    stand_ins = Path(__file__).parent / "stand_ins"
    job.env |= hosts | {
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "MODEL": str(tmp_path / "model.json"),
        "RANKS_PER_NODE": "1",
        "MASTER_PORT": str(29600 + os.getpid() % 1000),
    }
    return job
