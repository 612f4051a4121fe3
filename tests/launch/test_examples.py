"""Every file of examples/ runs as its first lines say, and learns what one process does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT
from tests.support import megatron_cpu

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WITHOUT_COMPILING = """
import runpy, sys
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from spectral_dist.integrations.deepspeed import _compat
_compat.without_compiling()
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""DeepSpeed would compile its collectives on CPUs, for a minute."""
WITHOUT_GPUS = """
import runpy, sys
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from tests.support import {module}
{module}.install({version})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Megatron and verl need GPUs."""
INSTEAD = {
    "deepspeed_zero.py": WITHOUT_COMPILING,
    "megatron_core.py": WITHOUT_GPUS.format(
        module="megatron_cpu", version=repr(megatron_cpu.VERSIONS[0])
    ),
    "megatron_bridge.py": WITHOUT_GPUS.format(module="bridge_cpu", version=""),
    "verl_fsdp2.py": WITHOUT_GPUS.format(module="verl_cpu", version=""),
}
NEEDS = {
    "lightning_fsdp2": "lightning", "megatron_bridge": "megatron.bridge", "trl_sft": "trl",
    "verl_fsdp2": "verl",
}  # fmt: skip
"""Packages that most installations of the tests do not have."""
ELSEWHERE = {"torchtitan_fsdp2", "ms_swift_plugin"}
"""Tested where the trainers are: tests/distributed/torchtitan and tests/distributed/ms_swift."""


def commands(path: Path) -> list[list[str]]:
    """The commands in the docstring of an example."""
    lines = re.findall(r"^((?:torchrun|python) [^#\n]+)", path.read_text(), re.MULTILINE)
    return [line.split() for line in lines]


def printed(command: list[str], folder: Path) -> str:
    """Run a command of the docstring here, and return what it prints."""
    where = {"runs/example": str(folder / "run")}
    words = [where.get(word, word) for word in command]
    program, *rest = words
    python = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else [])]
    instead = INSTEAD.get(Path(rest[-1]).name)
    if instead:
        script = folder / "quick.py"
        script.write_text(f"import sys\nsys.argv[0] = {str(ROOT / rest[-1])!r}\n{instead}")
        rest = [*rest[:-1], str(script)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*python, *rest],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    """Return the losses that an example prints."""
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]


def test_every_example_says_how_to_run_it() -> None:
    assert len(EXAMPLES) >= 8
    for path in EXAMPLES:
        assert any(f"examples/{path.name}" in command for command in commands(path)), path
        assert len(path.read_text().splitlines()) <= 80, path


def test_one_process(tmp_path: Path) -> None:
    first, *_, last = losses(printed(commands(ROOT / "examples/one_process.py")[0], tmp_path))
    assert last < first < 4.16  # of guessing among 64 tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({path.stem for path in EXAMPLES} - {"one_process", *ELSEWHERE})
)
def test_the_others(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name].partition(".")[0])
        if importlib.util.find_spec(NEEDS[name]) is None:
            pytest.skip(f"{NEEDS[name]} is not installed")
    for command in commands(ROOT / f"examples/{name}.py"):
        seen = losses(printed(command, tmp_path))
        assert seen
        assert max(seen) < 3.0


@pytest.mark.slow
def test_cut_otherwise_the_losses_are_the_same(tmp_path: Path) -> None:
    """DDP on 2 ranks, and tensor parallelism within FSDP2 on 4."""
    ddp, cut = (
        losses(printed(commands(ROOT / f"examples/{name}.py")[0], tmp_path))
        for name in ("ddp", "tp_fsdp")
    )
    assert ddp == pytest.approx(cut, abs=2e-4)
