"""Adapters of PEFT train under transformers' Trainer as in a loop of our own, and are saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from peft.utils import get_peft_model_state_dict

import spectral_dist
from spectral_dist.params.classify import classify
from tests.distributed.huggingface import peft_runs, trainer_runs
from tests.support import harness

LAYOUTS = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp_full": 2}


def run(world: int, function: Any, *args: Any) -> dict[str, Any]:
    result: dict[str, Any] = harness.run(world, function, *args, pool="peft")[0]
    return result


def close(got: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=bound)


@pytest.mark.parametrize("optimizer", ["muon", "sumo", "normuon"])
@pytest.mark.parametrize("kind", peft_runs.KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("one-saved-muon", "ddp-dora-sumo", "fsdp-lora-muon", "fsdp-embedding-sumo")
def test_the_trainer_does_what_a_loop_does(
    layout: str, kind: str, optimizer: str, tmp_path: Path
) -> None:
    world, args = LAYOUTS[layout], (str(tmp_path), layout, kind, optimizer)
    whole = run(world, peft_runs.by_trainer, *args)
    wanted = peft_runs.by_loop(world, kind, optimizer)
    close(whole["weights"], wanted["weights"], 2e-6)
    torch.testing.assert_close(whole["losses"], wanted["losses"], rtol=0, atol=1e-5)
    rest = run(world, peft_runs.resumed, *args)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    close(rest["weights"], whole["weights"], 0.0)
