"""verl's FSDP engine trains as a loop of our own does, saves and resumes, on 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl")

from tests.distributed.verl import engine_runs
from tests.support import harness


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """With a model in it."""
    engine_runs.write_model(tmp_path)
    return str(tmp_path)


def run(function: Any, *args: Any) -> list[Any]:
    return harness.run(engine_runs.RANKS, function, *args, pool="verl")


@pytest.mark.parametrize("optimizer", engine_runs.OPTIONS)
@pytest.mark.parametrize("offload", [False, True], ids=["stays", "offloaded"])
@pytest.mark.fast_cases("stays-Muon", "stays-SUMO")
def test_the_engine_does_what_a_loop_does(optimizer: str, offload: bool, folder: str) -> None:
    whole = run(engine_runs.by_engine, folder, optimizer, offload)
    _, of_loop = engine_runs.by_loop(folder, optimizer)
    for losses, wanted in zip(whole, of_loop, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-6)
    for rest, losses in zip(
        run(engine_runs.resumed, folder, optimizer, offload), whole, strict=True
    ):
        assert rest == losses[engine_runs.SAVED_AT * engine_runs.MICRO :]


def test_what_is_refused(folder: str) -> None:
    for said in run(engine_runs.errors, folder):
        assert "write strategy=fsdp2" in said["strategy"]
        assert "'Moun'; did you mean 'Muon'" in said["name"]
        assert "'momentun'; did you mean 'momentum'" in said["option"]


@pytest.mark.slow
def test_other_optimizers_are_left_alone(folder: str) -> None:
    module, said = run(engine_runs.of_torch, folder)[0]
    assert module.startswith("torch.optim")
    assert "works with verl 0.9.1, and 0.8.0 is installed" in said
