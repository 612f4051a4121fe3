"""Two hosts of network namespaces, and jobs on them; only where these can be made."""

from __future__ import annotations

import os
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
    made = subprocess.run(
        ["bash", str(SCRIPT), "up", "2", RATE], env=env, capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip().splitlines()[-1]}")
    yield named
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
