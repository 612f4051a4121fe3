"""spectral-dist table: which parameters of any model of transformers are matrices; and progress."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectral_dist.launch import command, progress
from spectral_dist.launch.cli import app
from spectral_dist.launch.progress import Progress

QWEN = {
    "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MLP, ATTENTION = 3 * 64 * 96, 2 * 64 * 64 + 2 * 64 * 32


def run(folder: Path, model: Any, *options: str) -> tuple[int, str]:
    """Return the status of the command on a config.json, and what it prints."""
    path = folder / "config.json"
    path.write_text(json.dumps(model))
    done = CliRunner().invoke(app, ["table", "--model", str(path), *options])
    return done.exit_code, " ".join(done.output.split())


def test_a_model_of_another_architecture(tmp_path: Path) -> None:
    status, text = run(tmp_path, QWEN)
    assert status == 0
    assert f"orthogonalized 14 14 {2 * (MLP + ATTENTION):,} Linear" in text
    assert text.count("AdamW") == 3  # the embedding, the head, norms


def test_options_are_those_of_param_groups(tmp_path: Path) -> None:
    status, text = run(tmp_path, QWEN, "--scalars", "q_proj", "--scalars", "up_proj")
    assert status == 0
    assert re.search(r"AdamW 2 0 8,192 scalars: 'q_proj'", text)
    status, text = run(tmp_path, QWEN, "--split", "gate_proj=2")
    assert f"orthogonalized 14 16 {2 * (MLP + ATTENTION):,}" in text


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ({**QWEN, "model_type": "qwen33"}, (), "'qwen33', which transformers does not know; did"),
        ([1], (), "model_type is None"),
        ({**QWEN, "hidden_size": "x"}, (), "no model can be built from"),
        (QWEN, ("--split", "qkv"), "write a name and a number, as qkv_proj=3"),
        (QWEN, ("--split", "gate_proj=7"), "gate_proj"),
        (QWEN, ("--scalars", "nothing"), "'nothing' matches no"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, model: Any, options: tuple[str, ...], said: str
) -> None:
    status, text = run(tmp_path, model, *options)
    assert status == 2
    assert text.startswith("spectral-dist table: ")
    assert said in text


def test_no_arguments_say_what_there_is() -> None:
    text = CliRunner().invoke(app, []).output
    assert all(name in text for name in ("table", "doctor", "calibrate", "convert"))


def test_progress_in_a_file_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    record = {"loss": 1.5, "bits_per_byte": 0.25, "tokens_per_second": 1000.0}
    with Progress(3, 200, first=True) as shown:
        for step in range(197):
            now = step * 1.0
            shown.advance(record, last=step == 196)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == ("pretrain: step 64 of 200: loss 1.500, 0.250 bits per byte, 1000 tokens/s")
    assert lines[-1].startswith("pretrain: step 200 of 200: ")
    with Progress(0, 1, first=False) as hidden:
        hidden.advance(record, last=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("missing", "extra"), [("typer", "cli"), ("rich", "cli"), ("transformers", "train")]
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, extra: str
) -> None:
    """The package itself needs torch alone."""
    for name in [n for n in sys.modules if n == missing or n.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("cli", "llama"):
        monkeypatch.delitem(sys.modules, f"spectral_dist.launch.{name}", raising=False)
        monkeypatch.delattr(f"spectral_dist.launch.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["spectral-dist", "table", "--model", "config.json"])
    said = rf"spectral-dist needs {missing}: pip install 'spectral-dist\[{extra}\]'"
    with pytest.raises(SystemExit, match=said):
        command.main()
