"""Forked ranks end as those do that torchrun executes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.forked import launcher, preload

SCRIPT = """
import os, pathlib, sys, time
pathlib.Path("begun" + os.environ["RANK"]).touch()
while os.environ["RANK"] == "1" and not pathlib.Path("last").exists():
    time.sleep(0.01)
sys.exit(0)
"""


def wait(met: Callable[[], object], seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_finished_rank_is_gone_and_a_killed_one_is_started_anew(tmp_path: Path) -> None:
    """None waits for the others where a kill could reach it: torchrun would never end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    preload("others")
    arguments = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1", str(script)]
    run = launcher(arguments, dict(os.environ), tmp_path, tmp_path / "printed.txt")
    torchrun = psutil.Process(run.pid)
    wait(lambda: (tmp_path / "begun0").exists() and (tmp_path / "begun1").exists())
    wait(lambda: len(torchrun.children()) == 1)
    (remaining,) = torchrun.children()
    (tmp_path / "begun0").unlink()
    os.kill(remaining.pid, signal.SIGKILL)
    wait(lambda: (tmp_path / "begun0").exists())
    (tmp_path / "last").touch()
    assert run.wait(100.0) == 0, (tmp_path / "printed.txt").read_text()
