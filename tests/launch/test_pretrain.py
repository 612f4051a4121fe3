"""Runs of launch/pretrain.py: they train, report, stop and go on as if they had not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectral_dist.launch import report
from spectral_dist.launch.engines import deepspeed as engines
from spectral_dist.launch.pretrain import app
from spectral_dist.monitor import QUANTITIES
from tests.launch.jobs import STEPS, LaunchedJob
from tests.launch.torch_runs import write

ADAMW = {
    "type": "AdamW",
    "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
}
MUON = {"type": "SpectralMuon", "params": {"lr": 0.01, "weight_decay": 0.1}}
MATRICES = 2 * 7  # of the model in jobs.py: layers times the attention's four and the MLP's three
SUMMARY = (  # numbers that the table shows
    *("parameters", "ranks", "step", "tokens", "validation_loss", "seconds"),
    *("optimizer_bytes_sent", "matrices_orthogonalized"),
)
IN_MATRICES = 2 * (4 * 32 * 32 + 3 * 32 * 48)


def _check_report(job: LaunchedJob, out: str, printed: str) -> None:
    summary: dict[str, Any] = job.summary(out)
    validation = job.losses(out, "validation")
    assert len(validation) == 3  # before, in the middle, at the end
    assert validation[0] == pytest.approx(math.log(320), rel=0.02)  # nothing learned yet
    assert validation[-1] < validation[0] - 0.3
    assert summary["validation_loss"] == validation[-1]
    assert summary["tokens"] == STEPS * 8 * 16
    assert summary["sample"].startswith("To create")
    assert (job.folder / out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((job.folder / out / "tensorboard").iterdir())
    assert "validation bits per byte" in printed


def _torch(job: LaunchedJob, engine: str, kind: str, **keys: Any) -> tuple[str, ...]:
    config = write(job.folder, {"type": kind, "lr": 0.01}, f"{kind}_{engine}", steps=STEPS, **keys)
    return ("--engine", engine, "--config", str(config))


@pytest.mark.parametrize("kind", [pytest.param("AdamW", marks=pytest.mark.slow), "Muon"])
def test_ddp_alone_and_resumed(job: LaunchedJob, kind: str) -> None:
    options = _torch(job, "ddp", kind)
    printed, _, other_seed, again, nothing, _ = job.in_turn(
        ("whole", *options),
        ("parts", *options, "--stop-at", "3"),
        ("!parts", *options, "--resume", "--seed", "1"),  # a run is not mixed with another
        ("!parts", *options),
        ("!new", *options, "--resume"),
        ("parts", *options, "--resume"),
    )
    _check_report(job, "whole", printed)
    assert "its seed was 0, now it is 1" in other_seed
    assert "holds a run" in again
    assert "no checkpoint to resume" in nothing
    assert len(job.losses("parts")) == len(job.losses("whole")) == STEPS
    assert job.losses("parts") == job.losses("whole")
    assert job.losses("parts", "validation") == job.losses("whole", "validation")
    summary: dict[str, Any] = job.summary("whole")
    assert summary["optimizer_bytes_sent"] == 0
    assert summary["matrices_orthogonalized"] == (MATRICES * STEPS if kind == "Muon" else 0)


@pytest.mark.slow
def test_from_two_ranks_of_fsdp_to_one_process(job: LaunchedJob) -> None:
    job.alone("whole", *_torch(job, "ddp", "Muon"))
    fsdp = _torch(job, "fsdp", "Muon", monitor_every=2)
    job.ranks(2, "parts", *fsdp, "--stop-at", "3")
    assert len(job.losses("parts")) == 3
    job.alone("parts", *_torch(job, "ddp", "Muon", monitor_every=2), "--resume")
    assert job.losses("parts") == pytest.approx(job.losses("whole"), abs=2e-6)
    assert job.losses("parts", "validation")[-1] == pytest.approx(
        job.losses("whole", "validation")[-1], abs=2e-6
    )
    lines = map(json.loads, (job.folder / "parts/metrics.jsonl").read_text().splitlines())
    watched = [record for record in lines if record["part"] == "matrices"]
    assert [record["step"] for record in watched] == [2, 4, 6]
    for record in watched:
        assert all(len(record[name]) == MATRICES for name in QUANTITIES)
        assert all(value > 0 for value in record["nuclear_norm"].values())
    summary: dict[str, Any] = job.summary("parts")
    assert summary["optimizer_state_bytes"] == [pytest.approx(_state_bytes(summary), rel=0.01)]


def _state_bytes(summary: dict[str, Any]) -> int:
    """Under Muon: 8 bytes a number under AdamW, 4 in a matrix."""
    return int(8 * summary["parameters"] - 4 * IN_MATRICES)


@pytest.mark.slow
def test_deepspeed_resumes_as_if_it_had_not_stopped(job: LaunchedJob) -> None:
    options = ("--config", str(job.config("zero2", 2, MUON)))
    _check_report(job, "whole", job.ranks(2, "whole", *options))
    job.ranks(2, "parts", *options, "--stop-at", "3")
    job.ranks(2, "parts", *options, "--resume")
    assert job.losses("parts") == job.losses("whole")
    assert job.losses("parts", "validation") == job.losses("whole", "validation")
    # ZeRO-2 halves the state.
    summary: dict[str, Any] = job.summary("whole")
    assert sum(summary["optimizer_state_bytes"]) == pytest.approx(_state_bytes(summary), rel=0.01)


def _finished(folder: Path, bits: float) -> Path:
    folder.mkdir()
    rows = [{"part": "train", "step": s, "loss": 9.0 - s} for s in (1, 2)]
    rows += [{"part": "validation", "step": s, "bits_per_byte": bits + 2 - s} for s in (0, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = dict.fromkeys(SUMMARY, 3) | {"optimizer": folder.name, "sample": "def [x]:"}
    summary |= {"validation_bits_per_byte": bits, "optimizer_state_bytes": [1000, 2000]}
    summary |= {"forward_backward_seconds": 3.0, "optimizer_seconds": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [str(_finished(tmp_path / name, bits)) for name, bits in (("a", 2.5), ("b", 2.25))]
    target = tmp_path / "both.png"
    result = CliRunner().invoke(report.app, ["compare", *runs, "--plot", str(target)])
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    assert [cell.strip() for cell in lines["validation bits per byte"].split("│")[2:4]] == [
        "2.5000",
        "2.2500",
    ]
    assert "1.0 s (25%)" in lines["optimizer step"]
    assert "def [x]:" in lines["sample"]
    assert str(target) in result.output
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no finished run"):
        report.show([tmp_path], target)


@pytest.mark.slow  # zero.Init and resuming: tests/distributed/deepspeed, and the test above
def test_zero_init_and_stopping_change_nothing(job: LaunchedJob) -> None:
    options = ("--config", str(job.config("zero3_adamw", 3, ADAMW)))
    _check_report(job, "plain", job.ranks(2, "plain", *options))
    job.ranks(2, "sharded", *options, "--zero-init", "--stop-at", "3")
    job.ranks(2, "sharded", *options, "--zero-init", "--resume")
    assert job.losses("sharded") == pytest.approx(job.losses("plain"), rel=1e-6)
    assert job.losses("sharded", "validation") == pytest.approx(
        job.losses("plain", "validation"), rel=1e-6
    )
    plain: dict[str, Any] = job.summary("plain")
    assert job.summary("sharded")["parameters"] == plain["parameters"]
    # ZeRO-3 halves the state.
    assert sum(plain["optimizer_state_bytes"]) == pytest.approx(8 * plain["parameters"], rel=0.01)


def test_what_would_be_ignored_is_refused(job: LaunchedJob) -> None:
    config = job.config("zero2_adamw", 2, ADAMW)

    def refusal(*options: str) -> str:
        result = CliRunner().invoke(app, [*job.arguments("a"), *options])
        assert result.exit_code == 2
        return result.output

    yaml = _torch(job, "ddp", "AdamW", tensor_parallel=2)
    assert "--steps belongs to --engine deepspeed" in refusal(*yaml, "--steps", "1")
    assert "--zero-init belongs to --engine deepspeed" in refusal(*yaml, "--zero-init")
    assert "tensor_parallel: only --engine fsdp has it" in refusal(*yaml)
    assert "unknown key 'train_batch_size'" in refusal("--engine", "ddp", "--config", str(config))
    assert "cannot read the DeepSpeed configuration" in refusal(*yaml[2:])
    without = job.folder / "without.json"
    without.write_text('{"optimizer": {"type": "AdamW"}}')
    assert "--steps is needed" in refusal("--config", str(without))
    with pytest.raises(ValueError, match="--zero-init needs ZeRO stage 3"):
        engines.DeepSpeedEngine(config, None, 0, None, zero_init=True)
    assert not (job.folder / "a").exists()


@pytest.mark.slow
def test_bad_data_ends_all_ranks(job: LaunchedJob) -> None:
    (job.folder / "data" / "bad.jsonl").write_text('{"txt": 1}\n')
    printed = job.ranks(2, "a", *_torch(job, "fsdp", "AdamW"), fails=True)
    assert printed.count("bad.jsonl:1: expected an object") == 2
