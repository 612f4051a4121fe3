"""The doctor passes good configs and fails each fault that it exists for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import spectral_dist
from spectral_dist.launch import doctor, doctor_config
from spectral_dist.launch.cli import app
from tests.distributed.deepspeed import engine
from tests.support import harness

MODEL = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def config(stage: int, **changes: Any) -> dict[str, Any]:
    return engine.config(stage, 2, **changes)


def rule(stage: int, kind: str, options: Any = None, **changes: Any) -> dict[str, Any]:
    result = config(stage, **changes)
    result["optimizer"] = {"type": kind, "params": {"lr": 0.02, **(options or {})}}
    return result


def rows(configuration: dict[str, Any], fault: str) -> dict[str, bool]:
    """The table on this rank, with a fault built in."""
    from spectral_dist.core import matrix_ops as handles
    from spectral_dist.launch import doctor
    from spectral_dist.launch.engines.deepspeed import prepare_deepspeed

    accelerator = prepare_deepspeed().get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    whole = handles.polar

    def halves(x: torch.Tensor, **options: Any) -> torch.Tensor:
        if x.dtype == torch.float64:  # what the step is compared with
            return whole(x, **options)
        return torch.cat([whole(part.contiguous(), **options) for part in x.chunk(2, 1)], 1)

    def sized(x: torch.Tensor, **options: Any) -> torch.Tensor:
        if x.dtype == torch.float64:
            return whole(x, **options)
        return whole(x, **options) * x.norm(dim=(1, 2), keepdim=True)

    def twice(self: Any, x: torch.Tensor, spec: Any = None) -> torch.Tensor:
        self.context.polar_calls += 2 * len(x)
        return whole(x)

    patches = {
        "": mock.patch.object(handles, "polar", whole),
        "local shards": mock.patch.object(handles, "polar", halves),
        "update clipped": mock.patch.object(handles, "polar", sized),
        "twice": mock.patch.object(handles.WholeMatrixOps, "polar", twice),
    }
    with patches[fault]:
        return {row.check: row.passed for row in doctor.Examination(configuration, MODEL).run()}


def failed(configuration: dict[str, Any], fault: str = "") -> list[str]:
    tables = harness.run(2, rows, configuration, fault)
    assert tables[0] == tables[1]
    assert len(tables[0]) == 5
    return [check for check, passed in tables[0].items() if not passed]


@pytest.mark.parametrize(
    "configuration",
    [
        config(0, fp16={"enabled": True}),
        config(1, bf16={"enabled": True}, accumulation=3),
        config(2),
        config(3, fp16={"enabled": True}, gradient_clipping=1.0),
        rule(2, "SpectralPolarGrad", gradient_clipping=1.0),
        rule(3, "SpectralPolarGrad", {"polar_first": True, "polar": "jordan"}),
        rule(1, "SpectralROOT", bf16={"enabled": True}),
        rule(3, "SpectralSUMO", {"rank": 0.25}, gradient_clipping=1.0),
    ],
    ids=[
        "stage 0 fp16",
        "stage 1 bf16",
        "stage 2",
        "stage 3 fp16",
        "PolarGrad",
        "PolarGrad, polar first",
        "ROOT bf16",
        "SUMO",
    ],
)
@pytest.mark.fast_cases("stage 1 bf16")
def test_good_configs_pass(configuration: dict[str, Any]) -> None:
    assert failed(configuration) == []


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("local shards", "direction = polar factor of the whole gradient"),
        ("update clipped", "clipping acts on the gradient"),
        ("twice", "every matrix orthogonalized once per step"),
    ],
)
def test_each_fault_is_seen(fault: str, check: str) -> None:
    assert check in failed(config(1), fault)


def test_an_unchecked_overflow_is_seen() -> None:
    assert failed(config(0, options={"check_finite": False})) == [
        "an overflowing step changes nothing"
    ]


def command(folder: Path, configuration: dict[str, Any]) -> list[str]:
    (folder / "ds.json").write_text(json.dumps(configuration))
    (folder / "model.json").write_text(json.dumps(MODEL))
    return ["doctor", "--config", str(folder / "ds.json"), "--model", str(folder / "model.json")]


@pytest.mark.slow
def test_command_prints_a_table_and_its_exit_status_says_it(tmp_path: Path) -> None:
    good = subprocess.run(
        [sys.executable, "-m", "spectral_dist.launch.cli", *command(tmp_path, config(2))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert good.returncode == 0, good.stderr[-2000:]
    assert good.stdout.count(" ok ") == 5


def test_exit_status_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are those of test_an_unchecked_overflow_is_seen, which takes real steps."""
    checks = [doctor.CheckResult(f"check {n}", n != 3, "as seen") for n in range(5)]
    monkeypatch.setattr(doctor, "examine", lambda *_: checks)
    bad = CliRunner().invoke(app, command(tmp_path, config(0)))
    assert bad.exit_code == 1
    assert bad.stdout.count(" ok ") == 4
    assert bad.stdout.count("FAILED") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"momentun": 0.9}}, "did you mean 'momentum'"),
        ({"optimizer": {"type": "AdamW"}}, "doctor checks spectral optimizers"),
        ({"optimizer": {"type": "SpectralPOET"}}, "which orthogonalizes no matrix"),
    ],
)
def test_errors_by_text(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    here = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # the ranks are processes as ever
    bad = CliRunner().invoke(app, command(tmp_path, config(1, **changes)), env=here)
    assert bad.exit_code == 2
    assert words in " ".join(bad.stderr.split())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"options": {"lr": "x"}}, "lr is 'x'"),
    "lr below 0": ({"options": {"lr": -1}}, "lr is -1"),
    "scalar_lr": ({"options": {"scalar_lr": "x"}}, "scalar_lr is 'x'"),
    "no params": ({"optimizer": {"type": "SpectralMuon", "params": 5}}, "optimizer.params is 5"),
    "accumulation": ({"gradient_accumulation_steps": "x"}, "gradient_accumulation_steps is 'x'"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    "batch": ({"train_batch_size": 0}, "train_batch_size is 0"),
    "micro-batch": ({"train_micro_batch_size_per_gpu": True}, "per_gpu is True"),
    "no multiple": ({"train_batch_size": 11}, "no multiple of 6 rows"),
    "steps_per_print": ({"steps_per_print": "x"}, "steps_per_print is 'x'"),
    "clipping": ({"gradient_clipping": "x"}, "gradient_clipping is 'x'"),
}
"""name -> (changes, what is said): what doctor sets itself, too, must be right."""


@pytest.mark.parametrize("name", WRONG)
def test_bad_values_are_not_replaced(name: str, tmp_path: Path) -> None:
    changes, words = WRONG[name]
    bad = CliRunner().invoke(app, command(tmp_path, config(1, **changes)))
    assert bad.exit_code == 2
    assert words in " ".join(bad.stderr.split())


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ([], "scheduler is []"),
        ({"type": 5}, "scheduler is {'type': 5}"),
        ({"type": "Nothing"}, "neither DeepSpeed nor torch knows"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "x"}}, 'scheduler "WarmupLR"'),
        ({"type": "WarmupLR", "params": {"nothing": 1}}, "nothing"),
    ],
)
def test_bad_schedulers_are_not_left_out(scheduler: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        doctor_config.check_scheduler({"scheduler": scheduler})


def test_good_values_and_those_of_hugging_face() -> None:
    from spectral_dist.launch.deepspeed_config import read

    shipped = sorted((Path(spectral_dist.__file__).parent / "configs/deepspeed").glob("*.json"))
    assert shipped
    for path in shipped:
        content = read(path)
        if content["optimizer"]["type"] not in ("AdamW", "SpectralPOET"):
            doctor_config.check_values(content)
            doctor_config.check_scheduler(content)
    auto = config(1, options={"lr": "auto"}, gradient_clipping="auto", train_batch_size="auto")
    doctor_config.check_values(auto)
    assert doctor.adapt_config(auto)["optimizer"]["params"]["lr"] == doctor.LR


def faulty(rank: int, *args: Any) -> None:
    """Doctor's rank, of which the second meets a ValueError where the first goes on."""

    def take_step(self: Any, engine: Any, factor: float = 1.0) -> None:
        raise ValueError("the batch of rank 1 is empty")

    if rank == 1:
        doctor.Examination.take_step = take_step
    spawned(rank, *args)


spawned = doctor._rank


@pytest.mark.slow
def test_an_error_of_one_rank_ends_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other waits for it in a collective, and must not do so until a timeout."""
    from transformers import LlamaConfig

    monkeypatch.setattr(doctor, "_rank", faulty)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="the batch of rank 1 is empty"):
        doctor.examine(config(2), LlamaConfig.from_dict(MODEL))
    assert time.monotonic() - begin < 240
