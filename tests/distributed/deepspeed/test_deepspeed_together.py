"""A DeepSpeed checkpoint that does not fit, on one rank or all, is an error on all; then one does.

One test after another in the same engines: to build them is what takes the time.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.deepspeed import engine
from tests.support import harness, together

RULES = {"Muon": {}, "SUMO": {"rank": 2}, "NorMuon": {}}
WRONG = [
    (saved, rule, f"was saved with another optimizer: {saved}, and this one is {rule}")
    for saved, rule in (
        ("SUMO", "Muon"), ("Muon", "SUMO"), ("Muon", "NorMuon"), ("NorMuon", "Muon"),
        ("SUMO", "NorMuon"), ("NorMuon", "SUMO"),
    )
]  # fmt: skip
"""(whose checkpoint, who loads it, what is said)"""


def build(stage: int, rule: str) -> Any:
    configuration = engine.config(stage, 2)
    params = {**engine.OPTIONS, **RULES[rule]}
    configuration["optimizer"] = {"type": f"Spectral{rule}", "params": params}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.engine_for(configuration, layers=1)


def save(folder: str, stage: int) -> None:
    """A step of each rule, and its checkpoint under its name."""
    for rule in RULES:
        running = build(stage, rule)
        engine.steps(running, 0, 1)
        running.save_checkpoint(folder, tag=rule)
        running.destroy()


def load(folders: list[str], right: str, stage: int, saved: str, rule: str, says: str) -> None:
    """Rank r loads from ``folders[r]``; then all from ``right``, and take a step."""
    import torch.distributed as dist

    running = build(stage, rule)
    with together.failing(says) as raised:
        running.load_checkpoint(folders[dist.get_rank()], tag=saved)
    running.load_checkpoint(right, tag=rule)
    losses = engine.steps(running, 1, 2)
    running.destroy()
    wanted = build(stage, rule)
    engine.steps(wanted, 0, 1)
    assert engine.steps(wanted, 1, 2) == losses
    wanted.destroy()
    raise raised[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_another_optimizers(stage: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    harness.run(2, save, folder, stage)
    for saved, rule, says in WRONG:
        together.expect(says, load, [folder] * 2, folder, stage, saved, rule, says)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_folder_that_is_missing_on_one_rank(stage: int, tmp_path: Path) -> None:
    """Of the matrix state, as where each node has a disk of its own."""
    written, right, lacking = (str(tmp_path / name) for name in ("written", "right", "lacking"))
    harness.run(2, save, written, stage)
    shutil.copytree(written, lacking)
    Path(written).rename(right)
    for rule in ("SUMO", "NorMuon"):
        shutil.rmtree(Path(lacking, rule, "spectral_dist"))
        says = "has no matrix state"
        together.expect(says, load, [right, lacking], right, stage, rule, rule, says)
