"""transformers' Trainer under DeepSpeed's ZeRO trains as a loop of our own does, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

from tests.distributed.huggingface import deepspeed_runs, trainer_runs
from tests.support import harness


def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
    result: dict[str, Any] = harness.run(
        2, deepspeed_runs.run, *args, pool="trainer_deepspeed", **kwargs
    )[0]
    return result


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("by", ["json", "factory", "zero_init"])
@pytest.mark.fast_cases("json-1-muon")
def test_the_trainer_does_what_a_loop_does(
    by: str, stage: int, optimizer: str, tmp_path: Path
) -> None:
    """DDP's losses are this loop's, too: see test_trainer."""
    if by == "zero_init" and stage < 3:
        pytest.skip("stage 3's")
    start = (str(tmp_path), stage, optimizer, by == "json", by == "zero_init")
    whole = run(*start)
    wanted = trainer_runs.by_loop(2, optimizer)
    title = {"muon": "Muon", "sumo": "SUMO"}[optimizer]
    assert (whole["class"], whole["stage"]) == (
        f"Spectral{title}" if by == "json" else title,
        stage,
    )
    assert whole["reported"] == [2, 4, 6]
    torch.testing.assert_close(whole["losses"], wanted["losses"], rtol=0, atol=2e-6)
    for name, value in whole["weights"].items():
        torch.testing.assert_close(value, wanted["weights"][name], rtol=0, atol=1e-6)
    rest = run(*start, resume=f"{tmp_path}/checkpoint-{trainer_runs.SAVED_AT}")
    assert rest["losses"][-3:] == whole["losses"][-3:]
    for name, value in rest["weights"].items():
        assert torch.equal(value, whole["weights"][name]), name


@pytest.mark.parametrize("in_json", [False, True])
@pytest.mark.slow
def test_a_batch_size_that_is_found(in_json: bool, tmp_path: Path) -> None:
    found = run(str(tmp_path), 2, "muon", in_json, smaller=True, save_strategy="no")
    wanted = run(str(tmp_path), 2, "muon", in_json, save_strategy="no")
    assert found["losses"] == wanted["losses"]
    for name, value in found["weights"].items():
        assert torch.equal(value, wanted["weights"][name]), name


def test_a_factory_beside_an_optimizer_in_the_json_is_refused(tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"pool": "trainer_deepspeed", "within": 30.0}
    for named, title in (("sumo", "SpectralSUMO"), ("muon", "SpectralMuon"), (None, "SGD")):
        harness.run_refused(
            2, rf"the DeepSpeed JSON names an optimizer \({title}\), so the Trainer has ignored",
            deepspeed_runs.refused, str(tmp_path), named, "muon", **keywords,
        )  # fmt: skip
    harness.run_refused(
        2, "SpectralCallback: the optimizer is a SGD; give the Trainer",
        deepspeed_runs.refused, str(tmp_path), None, None, **keywords,
    )  # fmt: skip
