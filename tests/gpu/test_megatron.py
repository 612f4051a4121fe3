"""Megatron-core on one rank: its distributed optimizer around ours steps as its plain one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import support

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
ON_CPU = "0.19.2"


def test_the_distributed_optimizer(device):
    arguments = [device.type]
    if device.type == "cuda":
        support.need("megatron")
    elif (ROOT / f".venv/megatron-core-{ON_CPU}").is_dir():
        arguments.append(ON_CPU)
    else:
        pytest.skip("megatron-core is not in .venv: launch/test.sh fetches it")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.megatron_run", *arguments],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("largest difference") == 3
