"""--engine megatron with spectral_poet: the model is rotated before it is wrapped."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch import megatron_runs as runs
from tests.launch.jobs import ROOT, LaunchedJob
from tests.support import harness

SAID = yaml.safe_load((ROOT / "configs/megatron/tiny_poet.yaml").read_text())
SMALL = {"block": 4, "merge_every": 4}


def write(folder: Path, name: str, optimizer: dict[str, Any] | None = None, **changed: Any) -> Path:
    said = SAID | {"batch": 8, "steps": 12, "warmup": 2, "use_distributed_optimizer": False}
    said["optimizer"] = SAID["optimizer"] | SMALL | (optimizer or {})
    (path := folder / f"{name}.yaml").write_text(yaml.safe_dump(said | changed))
    return path


def run(ranks: int, path: Path, *args: Any, **kwargs: Any) -> Any:
    return harness.run(ranks, runs.losses, path, *args, pool=runs.VERSION, **kwargs)[0]


@pytest.mark.slow
def test_it_trains_under_any_parallelism_and_resumes(tmp_path: Path) -> None:
    wanted, numbers = run(1, write(tmp_path, "alone", tensor_parallel=1))
    assert wanted[-1] < wanted[0] - 1
    for name, ranks, changed in (
        ("tp", 2, {"sequence_parallel": True}),
        ("both", 4, {"use_distributed_optimizer": True}),
    ):
        found, here = run(ranks, write(tmp_path, name, **changed))
        assert found == pytest.approx(wanted, rel=0, abs=1e-5), name
        assert here["parameters"] == numbers["parameters"]
    path, saved = tmp_path / "both.yaml", tmp_path / "saved"
    first, _ = run(4, path, steps=(0, 6), save=saved)  # between two merges
    then, _ = run(4, path, steps=(6, 12), load=saved)
    assert first + then == run(4, path)[0]
    half, here = run(2, write(tmp_path, "half", dtype="bfloat16"))
    assert here["dtypes"] == {"torch.bfloat16"}
    assert half == pytest.approx(wanted, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "changed", "said"),
    [
        ({"block": 5}, {}, r"linear_qkv/in and 1 like it: block 5 does not divide"),
        ({"scalars": ["q_proj"]}, {}, r"optimizer: scalars: 'q_proj' matches no trainable"),
        ({"segments": 1}, {}, "tensor_parallel: the optimizer's segments, 1, are no multiple"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, optimizer, changed, said) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path, "wrong", optimizer, **changed)
    with pytest.raises(harness.RankError, match=said):
        run(2, path)


@pytest.mark.slow
def test_pretrain_runs_it(job: LaunchedJob) -> None:
    job.script_of_ranks = (str(ROOT / "tests/launch/megatron_pretrain.py"), runs.VERSION)
    given = {"config": "configs/megatron/tiny_poet.yaml", "model": "configs/models/tiny.json"}
    options = ["--engine", "megatron"]
    for option, path in given.items():
        options += [f"--{option}", str(ROOT / path)]
    assert "rotated" in job.ranks(4, "whole", *options, "--stop-at", "4")
    job.ranks(4, "parts", *options, "--stop-at", "2")
    job.ranks(4, "parts", *options, "--stop-at", "4", "--resume")
    assert job.losses("parts") == job.losses("whole")
    assert job.losses("whole")[-1] < job.losses("whole")[0]
    assert json.dumps(job.summary("whole"))
