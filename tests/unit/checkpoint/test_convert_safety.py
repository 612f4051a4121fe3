"""What ``spectral-dist convert`` may overwrite and run: no other's name, and no code in tensors."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spectral_dist
from spectral_dist import checkpoint
from spectral_dist.checkpoint import convert, universal
from spectral_dist.launch.cli import app
from tests.support import models
from tests.support.quiet import quiet
from tests.unit.checkpoint.converting import loaded, refused, saved
from tests.unit.checkpoint.pickled_code import PickledCode


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


def test_code_in_the_place_of_a_tensor_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a", count=1)
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    torch.save({"param": PickledCode()}, tmp_path / "b" / "zero" / "embed.weight" / "exp_avg.pt")
    refused("is no plain data", "universal", tmp_path / "b", "dcp", tmp_path / "c")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["zero/optimizer_state.pt", universal.MODEL_FILE])
def test_code_in_engines_files_is_not_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a", count=1)
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    path = tmp_path / "b" / name
    content = torch.load(path, weights_only=True)
    path.unlink()  # it is linked
    torch.save({**content, "more": PickledCode()}, path)
    refused(f"{re.escape(str(path))} is no plain data.*print", "universal", tmp_path / "b", "dcp",
            tmp_path / "c")  # fmt: skip
    assert "run" not in capsys.readouterr().out
    assert not (tmp_path / "c").exists()


def test_help_says_that_no_code_is_run() -> None:
    done = CliRunner().invoke(app, ["convert", "--help"])
    assert "code in a file is not run" in " ".join(done.output.replace("│", " ").split())


# -- junk


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint in every format."""
    folder = tmp_path_factory.mktemp("good")
    saved(folder / "dcp", count=1, odd=False)
    for name in ("universal", "torch", "dion"):
        convert.convert("dcp", folder / "dcp", name, folder / name)
    return folder


def said(*arguments: Any) -> str:
    """The one line that the command prints, which ends with exit code 1."""
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("spectral-dist convert: ")
    return done.stderr


JUNK: dict[str, bytes] = {
    "empty": b"", "text": b"no checkpoint\n", "zip": b"PK\x03\x04" + bytes(60),
    "pickle": b"\x80\x04]\x94.", "long": bytes(range(256)) * 40,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["torch", "dion", "dcp", "universal"])
@pytest.mark.parametrize("junk", JUNK)
def test_junk(kind: str, junk: str, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(JUNK[junk])
    assert str(tmp_path / "junk") in said(kind, tmp_path / "junk", "dcp", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torch", "dion", "dcp", "universal"])
def test_an_empty_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert str(tmp_path / "folder") in said(kind, tmp_path / "folder", "dcp", tmp_path / "out")


@pytest.mark.parametrize("kind", ["torch", "dion"])
def test_truncated_files(kind: str, good: Path, tmp_path: Path) -> None:
    whole = (good / kind).read_bytes()
    for part in (0.0, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut").write_bytes(whole[: int(part * len(whole))])
        assert str(tmp_path / "cut") in said(kind, tmp_path / "cut", "dcp", tmp_path / "out")


def key_of(content: dict[str, Any]) -> str:
    return "muon" if "muon" in content else "dion"


def with_optimizer(content: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    return {**content, key_of(content): optimizer}


def with_groups(content: dict[str, Any], change: Any) -> dict[str, Any]:
    optimizer = content[key_of(content)]
    groups = [change(group) for group in optimizer["param_groups"]]
    return with_optimizer(content, {**optimizer, "param_groups": groups})


def with_states(content: dict[str, Any], state: Any) -> dict[str, Any]:
    optimizer = content[key_of(content)]
    states = dict.fromkeys(optimizer["state"], state)
    return with_optimizer(content, {**optimizer, "state": states})


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


SHORT = {"momentum": torch.zeros(1), "momentum_buffer": torch.zeros(1)}
WRONG: dict[str, Any] = {
    "a list": lambda c: [c],
    "a tensor": lambda c: torch.zeros(3),
    "no model": lambda c: without(c, "model"),
    "no optimizer": lambda c: {"model": c["model"]},
    "an empty optimizer": lambda c: with_optimizer(c, {}),
    "a number as optimizer": lambda c: with_optimizer(c, 5),
    "a number as model": lambda c: {**c, "model": 5},
    "an empty model": lambda c: {**c, "model": {}},
    "groups without lr": lambda c: with_groups(c, lambda g: without(g, "lr", "algorithm")),
    "groups without params": lambda c: with_groups(c, lambda g: without(g, "params")),
    "groups of text": lambda c: with_groups(c, lambda g: "group"),
    "lr of text": lambda c: with_groups(c, lambda g: {**g, "lr": "x"}),
    "states of text": lambda c: with_states(c, "state"),
    "states that are short": lambda c: with_states(c, SHORT),
}
"""How a file that torch.load reads can be none of ours."""


@pytest.mark.parametrize("kind", ["torch", "dion"])
@pytest.mark.parametrize("how", WRONG)
def test_files_that_are_incomplete(kind: str, how: str, good: Path, tmp_path: Path) -> None:
    torch.save(WRONG[how](torch.load(good / kind, weights_only=True)), tmp_path / "wrong")
    said(kind, tmp_path / "wrong", "dcp", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torch", "dion"])
def test_a_missing_target_folder(kind: str, good: Path, tmp_path: Path) -> None:
    message = said("dcp", good / "dcp", kind, tmp_path / "nowhere" / "x.pt")
    assert f"there is no folder {tmp_path / 'nowhere'}" in message
    (tmp_path / "file").write_text("")
    for each in (kind, "dcp", "universal"):
        said("dcp", good / "dcp", each, tmp_path / "file" / "x")


@pytest.mark.parametrize("kind", ["torch", "dion", "dcp", "universal"])
def test_what_was_not_written_whole_is_taken_away(
    kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = torch.save, [5 if kind == "universal" else 0]

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(file, "getvalue"):  # in memory
            original(content, file, *args, **kwargs)
            return
        left[0] -= 1
        if left[0] < 0:
            if isinstance(file, Path):
                file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in said("dcp", good / "dcp", kind, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_flipped_bits_of_a_universal_checkpoint_are_errors_or_numbers(
    good: Path, tmp_path: Path
) -> None:
    """Its files are DeepSpeed's, without hashes: no traceback, whatever they hold."""
    generator = random.Random(1)
    shutil.copytree(good / "universal", tmp_path / "copy")
    paths = sorted(path for path in (tmp_path / "copy").rglob("*.pt"))
    for number in range(20):
        path = generator.choice(paths)
        whole = path.read_bytes()
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.unlink()
        path.write_bytes(data)
        target = tmp_path / f"out{number}"
        done = CliRunner().invoke(
            app, ["convert", "universal", str(tmp_path / "copy"), "dcp", str(target)]
        )
        assert done.exit_code in (0, 1)
        assert done.exit_code == 0 or len(done.stderr.strip().splitlines()) == 1
        assert target.exists() == (done.exit_code == 0)
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["PolarGrad", "ROOT"])
def test_the_rule_comes_along(kind: str, tmp_path: Path) -> None:
    model = models.build(odd=False)
    with quiet():
        optimizer = getattr(spectral_dist, kind)(spectral_dist.param_groups(model))
        checkpoint.save(tmp_path / "a", model, optimizer)
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    convert.convert("universal", tmp_path / "b", "dcp", tmp_path / "c")
    with pytest.raises(ValueError, match=f"another optimizer: {kind}, and this one is Muon"):
        loaded(tmp_path / "c", odd=False)
    with quiet():
        checkpoint.load(tmp_path / "c", model, optimizer)
