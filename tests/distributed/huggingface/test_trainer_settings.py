"""Settings of transformers' Trainer that go through a training in another way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from spectral_dist.monitor import QUANTITIES
from tests.distributed.huggingface import trainer_runs, trainer_settings
from tests.support import harness

RANKS = {"one": 1, "ddp": 2, "fsdp": 2}
LAYOUTS = ["one", "ddp", "fsdp"]


def run(function: Any, folder: Path, layout: str, *args: Any) -> dict[str, Any]:
    result: dict[str, Any] = harness.run(RANKS[layout], function, str(folder), layout, *args)[0]
    return result


def close(got: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=bound)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_a_batch_size_that_is_found(layout: str, optimizer: str, tmp_path: Path) -> None:
    """The Trainer begins anew with a smaller batch, and keeps the optimizer: as if begun there."""
    found = run(trainer_settings.smaller, tmp_path, layout, optimizer)
    wanted = run(trainer_runs.by_trainer, tmp_path, layout, optimizer)
    assert found["losses"] == wanted["losses"]
    close(found["weights"], wanted["weights"], 0.0)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("ddp-muon")
def test_training_again_goes_on(layout: str, optimizer: str, tmp_path: Path) -> None:
    wanted = trainer_runs.by_loop(RANKS[layout], optimizer, times=2)
    found = run(trainer_settings.twice, tmp_path, layout, optimizer)
    close(found["weights"], wanted["weights"], 1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("layout", ["one", "ddp"])
@pytest.mark.fast_cases("ddp-sumo")
def test_the_best_is_saved_and_loaded(layout: str, optimizer: str, tmp_path: Path) -> None:
    """Its optimizer's state was gathered, though whether to save follows from an evaluation.

    Under FSDP2 transformers 5.24 cannot load the best model, with any optimizer: after an
    evaluation the root's parameters are whole.
    """
    result = run(trainer_settings.best, tmp_path, layout, optimizer)
    close(result["resumed"], result["last"], 0.0)
    close(result["saved"], result["at_end"], 0.0)
    assert any((result["last"][n] - v).abs().max() > 1e-3 for n, v in result["at_end"].items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("one")
def test_gradient_checkpointing_changes_nothing(layout: str, tmp_path: Path) -> None:
    got = run(trainer_settings.checkpointed, tmp_path, layout, True)
    close(got, run(trainer_settings.checkpointed, tmp_path, layout, False), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("ddp")
def test_reporters_see_the_monitors_readings(layout: str, tmp_path: Path) -> None:
    """Wherever they stand among the callbacks; not what prints, and not checkpoints."""
    result = run(trainer_settings.monitored, tmp_path, layout, False)
    assert list(result["reports"]) == [2, 4, 6, 8, 10, 12]  # the optimizer has gone on
    for logs in (result["before"], result["after"]):
        with_readings = [entry for entry in logs if any("/" in name for name in entry)]
        assert [entry["step"] for entry in with_readings] == [2, 4, 6] * 2
        for entry, report in zip(with_readings, result["reports"].values(), strict=True):
            assert "loss" in entry
            flat = {f"{q}/{m}": v for q, of in report.items() for m, v in of.items()}
            assert len(flat) == 14 * len(QUANTITIES)
            assert {name: v for name, v in entry.items() if "/" in name} == flat
    for logs in (result["printed"], result["history"]):
        assert logs
        assert not [name for entry in logs for name in entry if "/" in name]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
@pytest.mark.slow
def test_tensorboard_has_readings_beside_the_loss(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reports = run(trainer_settings.monitored, tmp_path, "one", True)["reports"]
    file = next(path for path in tmp_path.rglob("events*"))
    events = EventAccumulator(str(file.parent))
    events.Reload()
    name = next(iter(reports[4]["stable_rank"]))
    scalars = {e.step: e.value for e in events.Scalars(f"train/stable_rank/{name}")}
    assert scalars[4] == pytest.approx(reports[10]["stable_rank"][name])  # of the second training
    assert "train/loss" in events.Tags()["scalars"]
