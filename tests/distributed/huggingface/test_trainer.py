"""transformers' Trainer trains as a loop of our own does, saves and resumes, on 1 and 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from tests.distributed.huggingface import trainer_runs
from tests.support import harness

LAYOUTS = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp_full": 2}


def close(run: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(run["weights"][name], value, rtol=0, atol=bound)


def run(world: int, function: Any, *args: Any) -> dict[str, Any]:
    return harness.run(world, function, *args)[0]


@pytest.mark.parametrize("optimizer", trainer_runs.OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("one-poet", "ddp-muon", "ddp-sumo", "fsdp-sumo", "fsdp_full-normuon")
def test_the_trainer_does_what_a_loop_does(layout: str, optimizer: str, tmp_path: Path) -> None:
    world, folder = LAYOUTS[layout], str(tmp_path)
    whole = run(world, trainer_runs.by_trainer, folder, layout, optimizer)
    wanted = trainer_runs.by_loop(world, optimizer)
    close(whole, wanted, 1e-6)
    torch.testing.assert_close(whole["losses"], wanted["losses"], rtol=0, atol=2e-6)
    rest = run(world, trainer_runs.resumed, folder, layout, optimizer)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    close(rest, whole, 0.0)
