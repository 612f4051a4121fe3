"""SpectralPOET's checkpoints under DeepSpeed: nothing is lost, and nobody else takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.poet_runs import (
    BF16,
    CONVERSION,
    FP32_SUMS,
    check,
    configured,
    refused,
    start,
    train,
)
from tests.distributed.deepspeed.universal import to_universal
from tests.support import harness


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], v) for k, v in wanted.items())
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        *(pytest.param(s, {}, marks=pytest.mark.slow) for s in (0, 1)),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (3, {}),
        *(pytest.param(s, BF16, marks=pytest.mark.slow) for s in (0, 1, 2, 3)),
        pytest.param(1, FP32_SUMS, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_on_the_same_ranks(
    stage: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Just before a merge, just after it and in mid-cycle: every bit as if never stopped."""
    configuration, folder = configured(stage, 2, **changes), str(tmp_path)
    whole = harness.run(2, train, configuration, folder=folder, saves=(2, 3, 4))
    for step in (2, 3, 4):
        ranks = harness.run(2, train, configuration, folder=folder, first=step, load=f"s{step}")
        for never_stopped, result in zip(whole, ranks, strict=True):
            assert result["losses"] == never_stopped["losses"][step:]
            for what in ("parameters", "masters", "states", "merges"):
                assert same(result[what], never_stopped[what]), (step, what)
            assert {"mine": 3}.items() <= result["client_state"].items()
            assert "spectral_poet" not in result["client_state"]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(1, 2), (3, 3)])
@pytest.mark.parametrize("step", [3, 4])
def test_a_universal_checkpoint_on_other_ranks(
    stages: tuple[int, int], step: int, tmp_path: Path
) -> None:
    """W and its merges are in it, and each group's own step count: 2 -> 4 -> 1 ranks."""
    folder, load = str(tmp_path), {"checkpoint": {"load_universal": True}}
    harness.run(2, train, configured(stages[0], 2), folder=folder, last=step, saves=(step,))
    tag = to_universal(tmp_path, f"s{step}")
    config = configured(stages[1], 4, **load)
    harness.run(4, train, config, folder=folder, first=step, last=7, load=tag, saves=(7,))
    tag = to_universal(tmp_path, "s7")
    check(harness.run(1, train, configured(stages[1], 1, **load), folder=folder, first=7, load=tag))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_no_checkpoint_without_w(stage: int, tmp_path: Path) -> None:
    harness.run_refused(1, "leaves out W", save_parts, configured(stage, 1), str(tmp_path))


def save_parts(configuration: dict[str, Any], folder: str) -> None:
    running = start(configuration)
    running.save_checkpoint(folder, tag="a", exclude_frozen_parameters=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_of_others(stage: int, tmp_path: Path) -> None:
    """Another block size, or another optimizer on either side."""
    folder = str(tmp_path)
    harness.run(1, train, configured(stage, 1), folder=folder, last=1, saves=(1,))
    other = configured(stage, 1)
    other["optimizer"]["params"]["blocks"] = {**CONVERSION["blocks"], "qkv": 12}
    refused(other, "the block of inputs is 12 here, but 8|size mismatch", folder=folder, load="s1")
    muon = configured(stage, 1)
    muon["optimizer"] = {"type": "SpectralMuon", "params": engine.OPTIONS}
    refused(muon, "POET|skew_in", folder=folder, load="s1")
    harness.run(1, engine.interrupted, muon, folder, first=0, last=1, save="m", hidden=30)
    refused(configured(stage, 1), "skew_in", folder=folder, load="m")
