"""What happens to the files of a checkpoint: a full disk, damage, a rank that is slow to write."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_dist.launch import checkpoints, files
from spectral_dist.launch.ranks import Ranks
from tests.faults.trials import ENGINES, StruckJob

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
SAVES = ("--save-every", "2", "--resume", "auto")
LIMIT = 100_000
"""Bytes that a file may have: more than a log, less than a shard."""
pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(trial: StruckJob) -> Iterator[Path]:
    """A folder of checkpoints with room for one."""
    folder = trial.folder / "parts/checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("only root mounts a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fails_and_goes_on(
    trial: StruckJob,
    engine: str,
    said: str,
    free: Callable[[], object],
    fault: dict[str, Any] | None = None,
) -> None:
    """The save of step 4 fails; the checkpoint before it stays, and is gone on from."""
    options = (*trial.options(engine), *SAVES)
    status, printed = trial.once("whole", *options, forked=True)
    assert status == 0, printed
    status, printed = trial.once("parts", *options, fault=fault, forked=True)
    assert status == 1, printed
    assert said in printed, printed
    assert trial.check("parts", trial.losses("whole")) == 2
    free()
    status, printed = trial.once("parts", *options, forked=True)
    assert status == 0, printed
    assert "goes on from" in printed
    assert trial.losses("parts") == trial.losses("whole")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_may_not_grow(trial: StruckJob, engine: str) -> None:
    fault = {"phase": "save", "step": 4, "ranks": [1], "limit": LIMIT}
    fails_and_goes_on(trial, engine, "File too large", lambda: None, fault=fault)


@pytest.mark.parametrize("engine", ["ddp", "ds1"])
def test_a_full_disk(trial: StruckJob, engine: str, small_disk: Path) -> None:
    def free() -> None:
        grow = ["mount", "-o", "remount,size=9m", str(small_disk)]
        subprocess.run(grow, check=True)

    fails_and_goes_on(trial, engine, "No space left on device", free)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_is_slow_to_write(trial: StruckJob, engine: str) -> None:
    """All are killed when the other one has written its part."""
    options = (*trial.options(engine), *SAVES)
    status, printed = trial.once("whole", *options, forked=True)
    assert status == 0, printed
    fault = {"phase": "shard", "step": 4, "ranks": [1], "seconds": 60}
    run = trial.start("parts", *options, fault=fault, forked=True)
    assert run.until((trial.folder / "parts.struck.1").exists)
    assert run.pause(2.0)
    assert files.sizes_below(run.out / "checkpoints/step_000004")
    run.kill()
    assert trial.check("parts", trial.losses("whole")) == 2
    status, printed = trial.once("parts", *options, forked=True)
    assert status == 0, printed
    assert trial.losses("parts") == trial.losses("whole")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


class NotingEngine:
    """An engine that notes what it is given to read."""

    def __init__(self) -> None:
        self.loaded: Path | None = None

    def read(self, source: Path) -> None:
        self.loaded = source


@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_file_of_each_kind(trial: StruckJob, engine: str) -> None:
    """No framework gets to read it: the one before is taken, or the file is named."""
    options = trial.options(engine)
    status, printed = trial.once("run", *options, *SAVES, "--stop-at", "4", forked=True)
    assert status == 0, printed
    folder = trial.folder / "run/checkpoints"
    names = sorted(files.sizes_below(folder / "step_000004"))
    assert len(names) > 3
    shutil.copytree(folder, trial.folder / "kept")
    for name in names:
        for damage in (flipped, cut, emptied, Path.unlink):
            shutil.rmtree(folder)
            shutil.copytree(trial.folder / "kept", folder)
            damage(folder / "step_000004" / name)
            reader: Any = NotingEngine()
            checkpoint, notes = checkpoints.find(folder)
            assert checkpoint is not None
            if damage is flipped and name != checkpoints.MANIFEST:
                with pytest.raises(ValueError, match=f"{name} is not what was saved"):
                    checkpoints.load(reader, ALONE, checkpoint, {})
                assert reader.loaded is None
            else:
                assert name in notes[0]
                assert "step_000002 is taken, the newest whole checkpoint" in notes[-1]
                checkpoints.load(reader, ALONE, checkpoint, {})
                assert reader.loaded == folder / "step_000002"
    status, printed = trial.once("run", *options, "--resume", forked=True)
    assert status == 0, printed
    assert f"{folder / 'step_000002'} is taken" in printed
    shutil.rmtree(folder)
    shutil.copytree(trial.folder / "kept", folder)
    names.remove(checkpoints.MANIFEST)
    flipped(folder / "step_000004" / names[0])
    status, printed = trial.once("run", *options, "--resume", forked=True)
    assert status == 1, printed  # torchrun's; the ranks' is 2
    assert f"{names[0]} is not what was saved" in printed
