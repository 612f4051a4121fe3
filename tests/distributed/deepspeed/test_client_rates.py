"""A client optimizer's learning rates under DeepSpeed: one of its schedulers, or one of torch's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import spectral_dist
from tests.distributed.deepspeed import engine
from tests.support import harness

RATES = {"lr": 0.02, "scalar_lr": 0.005}
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0.002, "warmup_max_lr": 0.02, "warmup_num_steps": 3},
}


def rates(how: str) -> list[list[float]]:
    """What groups are stepped with, before each step and after the last."""
    pytest.importorskip("deepspeed")
    configuration = engine.config(1, 1, scheduler=WARMUP) if how == "json" else engine.config(1, 1)
    del configuration["optimizer"]
    configuration["zero_allow_untested_optimizer"] = True
    schedules: list[Any] = []

    def make(model: torch.nn.Module) -> Any:
        optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), **RATES)
        if how == "before":
            schedules.append(
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            )
        return optimizer

    made = engine.engine_for(configuration, optimizer=make)
    optimizer = made.basic_optimizer
    seen = []
    for step in range(4):
        seen.append([optimizer.lr_of(group) for group in optimizer.param_groups])
        engine.steps(made, step, step + 1)
        if how == "by hand":
            for group in made.optimizer.param_groups:
                group["lr"] = 0.01
        for schedule in schedules:
            schedule.step()
    return seen


def warned(stage: int) -> list[str]:
    """What is said of learning rates in steps with scalar_lr."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.steps(engine.engine_for(engine.config(stage, 1)), 0, 2)
    return [text for each in told if "lr" in (text := str(each.message)).split()]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_is_said_of_rates_that_nobody_writes(stage: int) -> None:
    assert harness.run(1, warned, stage) == [[]]


def test_its_own_schedulers_keep_the_ratio() -> None:
    """DeepSpeed's schedulers write one lr into every group."""
    (seen,) = harness.run(1, rates, "json")
    assert len({matrix for matrix, _ in seen}) > 1
    for matrix, scalar in seen:
        assert scalar == pytest.approx(matrix / 4)


def test_one_number_by_hand_keeps_it() -> None:
    (seen,) = harness.run(1, rates, "by hand")
    assert seen[0] == pytest.approx([0.02, 0.005])
    assert seen[-1] == pytest.approx([0.01, 0.0025])


def test_a_scheduler_of_torchs_that_was_there_before() -> None:
    """It has each group's own lr, and writes it."""
    (seen,) = harness.run(1, rates, "before")
    for step, (matrix, scalar) in enumerate(seen):
        assert matrix == pytest.approx(0.02 / (1 + step))
        assert scalar == pytest.approx(0.005 / (1 + step))
