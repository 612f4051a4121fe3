"""torchtitan's Trainer trains as a loop of our own does, saves and resumes, on 1 and 2 ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchtitan")

from tests.distributed.torchtitan.cases import LAYOUTS, OPTIONS, SAVED_AT, STEPS
from tests.support import harness

LAST = {"pp": 1}
"""The rank that knows the loss, where that is not the first one."""


def of_ranks(name: str) -> Any:
    """A function of trainer_runs, which ranks alone may import: it changes torch for CPUs."""
    module = "tests.distributed.torchtitan.trainer_runs"
    return SimpleNamespace(__module__=module, __qualname__=name)


def run(world: int, name: str, *args: Any) -> list[Any]:
    return harness.run(world, of_ranks(name), *args, pool="torchtitan")


@cache
def of_loop(optimizer: str) -> dict[int, float]:
    return run(1, "by_loop", optimizer)[0]


def rest(losses: dict[int, float]) -> dict[int, float]:
    return {step: loss for step, loss in losses.items() if step > SAVED_AT}


CASES = [(x, y) for x in LAYOUTS for y in OPTIONS if (x, y) != ("tp", "poet")]


@pytest.mark.parametrize(("layout", "optimizer"), CASES)
@pytest.mark.fast_cases("fsdp-sumo", "fsdp-muon")
def test_the_trainer_does_what_a_loop_does(layout: str, optimizer: str, tmp_path: Path) -> None:
    world = 1 if layout == "one" else 2
    ranks = run(world, "whole_and_resumed", str(tmp_path), layout, optimizer)
    whole, resumed = ranks[LAST.get(layout, 0)]
    assert len(whole) == STEPS
    assert whole == pytest.approx(of_loop(optimizer), rel=1e-6)
    assert resumed == pytest.approx(rest(whole), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize(("saved", "loaded"), [("fsdp", "one"), ("one", "fsdp"), ("pp", "fsdp")])
@pytest.mark.fast_cases("fsdp-one-sumo")
def test_another_layout_resumes(saved: str, loaded: str, optimizer: str, tmp_path: Path) -> None:
    """Matrix state too, which torchtitan's own loading would leave out."""
    saving, loading = (1 if layout == "one" else 2 for layout in (saved, loaded))
    folder = str(tmp_path)
    run(saving, "by_trainer", folder, saved, optimizer, SAVED_AT)
    resumed = run(loading, "by_trainer", folder, loaded, optimizer)[0]
    assert resumed == pytest.approx(rest(of_loop(optimizer)), abs=1e-5)


WRONG = {
    "moun": ({"name": "moun"}, "unknown optimizer 'moun'; did you mean 'muon'"),
    "option": (
        {"options": {"momentun": 0.9}},
        "unknown option 'momentun'; did you mean 'momentum'",
    ),
    "lr": ({"options": {"lr": 0.1}}, "options has lr"),
    "poet": ({"name": "poet"}, "built with converters=[PoetConverter.Config()]"),
    "fused": ({"implementation": "foreach"}, "implementation is of torchtitan's own optimizers"),
    "pattern": ({"options": {"scalars": ["no_such"]}}, "no_such"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case: str, tmp_path: Path) -> None:
    keywords, message = WRONG[case]
    for error in harness.run_expecting_errors(
        2, of_ranks("refused"), str(tmp_path), "fsdp", pool="torchtitan", within=60.0, **keywords
    ):
        assert error.startswith("ValueError"), error
        assert message in error


def test_tensor_parallelism_refuses_rotations(tmp_path: Path) -> None:
    for error in harness.run_expecting_errors(
        2,
        of_ranks("refused"),
        str(tmp_path),
        "tp",
        True,
        pool="torchtitan",
        within=60.0,
        name="poet",
    ):
        assert error.startswith("ValueError"), error
        assert "POET does not run under torchtitan's tensor parallelism" in error


def test_the_example_learns(tmp_path: Path) -> None:
    """Its file, with torchtitan's flags."""
    flags = f"--dump_folder {tmp_path} --training.seq_len 16 --training.local_batch_size 2"
    flags += " --training.steps 8 --optimizer.name normuon --optimizer.lr 0.01"
    losses, optimizers = run(2, "by_example", flags.split())[0]
    assert optimizers == ["NorMuon"]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
