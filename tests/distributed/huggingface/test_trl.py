"""TRL's trainers with our factory: as one process, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("trl")

from tests.distributed.huggingface import trainer_runs
from tests.support import harness

LAYOUTS = {"one": 1, "ddp": 2, "fsdp": 2}


def run(folder: Path, layout: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    from tests.distributed.huggingface import trl_runs

    first: dict[str, Any]
    first, *others = harness.run(
        LAYOUTS[layout], trl_runs.run, str(folder), layout, *args, pool="trl", **kwargs
    )
    for other in others:
        close(other["weights"], first["weights"], 0.0)
    return first


def close(got: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=bound)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("ddp-muon", "fsdp-sumo")
def test_sft_does_what_a_loop_does(layout: str, optimizer: str, tmp_path: Path) -> None:
    whole = run(tmp_path, layout, "sft", optimizer)
    wanted = trainer_runs.by_loop(LAYOUTS[layout], optimizer)
    torch.testing.assert_close(whole["losses"], wanted["losses"], rtol=0, atol=2e-6)
    close(whole["weights"], wanted["weights"], 1e-6)
    rest = run(tmp_path, layout, "sft", optimizer, resume=True)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    close(rest["weights"], whole["weights"], 0.0)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("which", ["dpo", "reward"])
@pytest.mark.fast_cases("dpo-muon")
def test_two_ranks_do_what_one_does(which: str, optimizer: str, tmp_path: Path) -> None:
    """DPOTrainer has no argument for the factory: it is set after."""
    whole = run(tmp_path, "ddp", which, optimizer)
    assert whole["class"] == {"muon": "Muon", "sumo": "SUMO"}[optimizer]
    one = run(
        tmp_path / "one", "one", which, optimizer, ranks_of_data=2,
        per_device_train_batch_size=2 * trainer_runs.BATCH,
    )  # fmt: skip
    assert min(whole["norms"]) > 1e-4
    torch.testing.assert_close(whole["losses"], one["losses"], rtol=0, atol=2e-6)
    close(whole["weights"], one["weights"], 1e-11 if which == "reward" else 1e-6)
    rest = run(tmp_path, "ddp", which, optimizer, resume=True)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    close(rest["weights"], whole["weights"], 0.0)


@pytest.mark.parametrize("optimizer", ["muon", "sumo"])
@pytest.mark.parametrize("layout", ["one", "ddp"])
@pytest.mark.slow
def test_grpo_learns(layout: str, optimizer: str, tmp_path: Path) -> None:
    """Its loss is 0 by construction where the policy has just sampled, its gradient is not."""
    whole = run(tmp_path, layout, "grpo", optimizer)
    assert whole["class"] == {"muon": "Muon", "sumo": "SUMO"}[optimizer]
    steps = [norm for norm, std in zip(whole["norms"], whole["rewards"], strict=True) if std > 0]
    assert len(steps) > 3
    assert min(steps) > 1e-3
    name = "model.layers.0.mlp.up_proj.weight"
    assert (whole["weights"][name] - whole["start"][name]).abs().max() > 1e-3
