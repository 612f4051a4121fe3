"""Lightning's DeepSpeedStrategy trains as a loop of our own does, saves and resumes, on 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("deepspeed")

from tests.distributed.lightning import deepspeed_runs, trainer_runs
from tests.support import harness


def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
    result: dict[str, Any] = harness.run(
        2, deepspeed_runs.run, *args, pool="lightning_deepspeed", **kwargs
    )[0]
    return result


@pytest.mark.parametrize("name", trainer_runs.OPTIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("by", ["json", "code"])
@pytest.mark.fast_cases("json-2-Muon", "code-3-SUMO", "code-2-POET")
def test_the_trainer_does_what_a_loop_does(by: str, stage: int, name: str, tmp_path: Path) -> None:
    start = (str(tmp_path), stage, name, by == "json")
    whole = run(*start)
    assert (whole["class"], whole["stage"]) == (
        f"Spectral{name}" if by == "json" else name,
        stage,
    )
    wanted = deepspeed_runs.by_loop(name, by == "json")
    assert whole["weights"].keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(whole["weights"][key], value, rtol=0, atol=1e-6)
    rest = run(*start, resume=f"{tmp_path}/epoch=0.ckpt")
    assert rest["losses"] == whole["losses"][len(whole["losses"]) // 2 :]
    for key, value in whole["weights"].items():
        assert torch.equal(rest["weights"][key], value), key
