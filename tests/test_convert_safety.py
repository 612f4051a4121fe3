"""What ``spectral-dist convert`` may overwrite and run: no other's name, and no code in tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectral_dist import convert
from spectral_dist.cli import app
from tests.test_convert import refused, saved


def test_latest_universal_of_another_checkpoint_is_kept(tmp_path: Path) -> None:
    """DeepSpeed looks beside the tag for the one to load, so that a first one is named there."""
    saved(tmp_path / "a", count=1)
    latest = tmp_path / "latest_universal"
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    assert latest.read_text() == "b"
    instead = tmp_path / "c" / "c"
    message = f"names 'b', which engines .* write to {re.escape(str(instead))}"
    refused(message, "dcp", tmp_path / "a", "universal", tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", latest.name}
    convert.convert("dcp", tmp_path / "a", "universal", instead)
    assert (instead.parent / latest.name).read_text() == "c"
    latest.write_text("d\n")  # as an editor leaves it
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "d")
    assert latest.read_text() == "d\n"


class Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_code_in_the_place_of_a_tensor_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a", count=1)
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    torch.save({"param": Code()}, tmp_path / "b" / "zero" / "embed.weight" / "exp_avg.pt")
    refused("holds more than a tensor", "universal", tmp_path / "b", "dcp", tmp_path / "c")
    assert "run" not in capsys.readouterr().out


def test_help_says_that_code_may_run() -> None:
    done = CliRunner().invoke(app, ["convert", "--help"])
    assert "checkpoints that you trust" in " ".join(done.output.replace("│", " ").split())
