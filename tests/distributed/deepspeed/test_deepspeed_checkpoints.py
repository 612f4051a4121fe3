"""A run that stops and goes on equals the one that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.engine import errors
from tests.distributed.deepspeed.universal import SCHEDULER, to_universal
from tests.reference import training
from tests.support import harness


def configuration(stage: int, world: int, universal: bool = False) -> dict[str, Any]:
    changes = {"checkpoint": {"load_universal": True}} if universal else {}
    return engine.config(stage, world, zero={"sub_group_size": 3000}, **changes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.fast_cases("3")
def test_same_world(stage: int, tmp_path: Path) -> None:
    wanted = training.train(engine.OPTIONS, 7)
    config = configuration(stage, 2)
    whole = harness.run(2, engine.interrupted, config, str(tmp_path), first=0, last=7)
    harness.run(2, engine.interrupted, config, str(tmp_path), first=0, last=4, save="a")
    ranks = harness.run(2, engine.interrupted, config, str(tmp_path), first=4, last=7, load="a")
    for never_stopped, result in zip(whole, ranks, strict=True):
        matrix, rest = errors(result["parameters"], wanted)
        assert matrix < 1e-6
        assert rest < 1e-5
        assert result["losses"] == never_stopped["losses"][4:]  # bitwise
        assert result["groups"] == never_stopped["groups"]
        assert result["state_bytes"] == never_stopped["state_bytes"]


@pytest.mark.parametrize("stages", [(1, 1, 1), (3, 3, 3), (1, 2, 1)])
@pytest.mark.slow
def test_universal_over_2_4_3_ranks(stages: tuple[int, int, int], tmp_path: Path) -> None:
    """Between stages 1 and 2 too; DeepSpeed 0.19.8 itself refuses between 3 and the others."""
    wanted = training.train(engine.OPTIONS, 9)
    folder = str(tmp_path)
    config = configuration(stages[0], 2)
    harness.run(2, engine.interrupted, config, folder, first=0, last=3, save="a")
    tag = to_universal(tmp_path, "a")
    config = configuration(stages[1], 4, universal=True)
    harness.run(4, engine.interrupted, config, folder, first=3, last=6, load=tag, save="b")
    tag = to_universal(tmp_path, "b")
    config = configuration(stages[2], 3, universal=True)
    ranks = harness.run(3, engine.interrupted, config, folder, first=6, last=9, load=tag)
    for result in ranks:
        matrix, rest = errors(result["parameters"], wanted)
        assert matrix < 1e-6
        assert rest < 1e-5
        assert set(result["adam_steps"]) == {9.0}
        # stage 3 loads group 0's options into every group; each must have its own again
        assert [g["kind"] for g in result["groups"]] == ["matrix", "scalar"]
        assert result["groups"][1]["lr_ratio"] == pytest.approx(0.25)
        assert 0 <= result["state_bytes"] - 43200 / 3 <= 100  # no second moment for matrices
        assert result["second_moments"] == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scheduler_keeps_the_ratio_of_the_learning_rates(stage: int, tmp_path: Path) -> None:
    """DeepSpeed writes one lr into every group; scalar_lr must stay a quarter of it."""
    config = {**configuration(stage, 2), **SCHEDULER}
    whole = harness.run(2, engine.interrupted, config, str(tmp_path), first=0, last=6)[0]
    assert [g["lr"] for g in whole["groups"]] == [whole["groups"][0]["lr"]] * 2
    assert [g["lr_ratio"] for g in whole["groups"]] == [1.0, pytest.approx(0.25)]
    assert len(set(whole["lrs"])) > 3
    factors = [lr / engine.OPTIONS["lr"] for lr in whole["lrs"]]
    wanted = training.train(engine.OPTIONS, 6, factors=factors)
    matrix, rest = errors(whole["parameters"], wanted)
    assert matrix < 1e-6
    assert rest < 1e-5
