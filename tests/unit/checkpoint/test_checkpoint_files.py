"""What a damaged, interrupted or foreign checkpoint does: an error that names it, and no more."""

from __future__ import annotations

import enum
import hashlib
import io
import json
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import spectral_dist
from spectral_dist import checkpoint
from spectral_dist.checkpoint import dcp, plain
from spectral_dist.checkpoint import files as checkpoint_files
from tests.support import harness, together
from tests.support.together import LAYOUTS, OptimizedModel, quiet
from tests.unit.checkpoint.loading import (
    RULES,
    everything,
    made,
    refused,
    unchanged,
    without_manifest,
)
from tests.unit.checkpoint.pickled_code import PickledCode

FLIPS = 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each rule after three steps."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "saved" for kind in RULES}
    for kind, folder in folders.items():
        checkpoint.save(folder, *made(kind, 3), step=3)
    return folders


# -- the manifest


@pytest.mark.parametrize("kind", RULES)
def test_every_file_is_in_the_manifest_with_its_hash(kind: str, saved: dict[str, Path]) -> None:
    content = json.loads((saved[kind] / "spectral_dist.json").read_text())
    files = {path.name: path.read_bytes() for path in saved[kind].iterdir()}
    files.pop("spectral_dist.json")
    assert content["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    assert {".metadata", "__0_0.distcp"} == files.keys()


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "spectral_dist.json"])
def test_flipped_bits(kind: str, name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved[kind], folder)
    whole = (folder / name).read_bytes()
    model, optimizer = made(kind, 1, seed=1)
    generator = random.Random(f"{kind} {name}")
    for _ in range(FLIPS):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (folder / name).write_bytes(data)
        assert str(folder / name) in refused(folder, model, optimizer)
    (folder / name).write_bytes(whole)
    assert checkpoint.load(folder, model, optimizer) == {"step": 3}
    unchanged(everything(*made(kind, 3)), model, optimizer)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "spectral_dist.json"])
def test_truncated_and_empty_files(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved["Muon"], folder)
    whole = (folder / name).read_bytes()
    model, optimizer = made("Muon", 1, seed=1)
    for length in (len(whole) - 1, len(whole) // 2, 1, 0):
        (folder / name).write_bytes(whole[:length])
        assert str(folder / name) in refused(folder, model, optimizer)


@pytest.mark.parametrize(
    ("name", "says"),
    [("__0_0.distcp", "__0_0.distcp"), (".metadata", "holds no checkpoint"),
     ("spectral_dist.json", "is not complete")],
)  # fmt: skip
def test_missing_files(name: str, says: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved["Muon"], folder)
    (folder / name).unlink()
    message = refused(folder, *made("Muon", 1, seed=1))
    assert says in message
    assert str(folder) in message


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "spectral_dist.json"])
def test_a_file_of_another_checkpoint(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Of the same model, a step later: nothing in the file itself is wrong."""
    folder, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(saved["Muon"], folder)
    checkpoint.save(other, *made("Muon", 4), step=4)
    shutil.copyfile(other / name, folder / name)
    message = refused(folder, *made("Muon", 1, seed=1))
    assert str(folder / name) in message or name == "spectral_dist.json"
    assert str(folder) in message


def test_a_folder_in_the_place_of_a_file(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved["Muon"], folder)
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").mkdir()
    assert str(folder / "__0_0.distcp") in refused(folder, *made("Muon", 1, seed=1))


def test_a_second_save_takes_the_place_of_the_first(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, *made("Muon", 3), step=3)
    with pytest.warns(UserWarning, match="existing checkpoint"):
        checkpoint.save(tmp_path, *made("Muon", 4), step=4)
    model, optimizer = made("Muon", seed=1)
    assert checkpoint.load(tmp_path, model, optimizer) == {"step": 4}
    unchanged(everything(*made("Muon", 4)), model, optimizer)


# -- a save that is interrupted


@pytest.mark.parametrize("again", [False, True], ids=["first", "over another"])
@pytest.mark.parametrize("when", ["data", "metadata", "manifest"])
def test_an_interrupted_save_is_no_checkpoint(
    when: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a full disk: wherever it stops, what is there is not taken for a whole one."""
    if again:
        checkpoint.save(tmp_path, *made("Muon", 3), step=3)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    target: tuple[Any, str] = {
        "data": (torch, "save"),
        "metadata": (pickle, "dump"),
        "manifest": (checkpoint_files, "replace"),
    }[when]
    model, optimizer = made("Muon", 4)
    state = checkpoint.state_dict(optimizer)
    monkeypatch.setattr(dcp, "_content", lambda *_: {"optimizer": state, "extra": b""})
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.setattr(*target, full)
        with pytest.raises(RuntimeError, match=r"No space left on device"):
            checkpoint.save(tmp_path, model, optimizer)
    message = refused(tmp_path, *made("Muon", 1, seed=1))
    assert ("is not complete" if again or when == "manifest" else "holds no checkpoint") in message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".spectral")]


# -- checkpoints of older releases, which have no hashes


def test_an_old_one_loads(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved["Muon"], folder)
    without_manifest(folder)
    model, optimizer = made("Muon", seed=1)
    assert checkpoint.load(folder, model, optimizer) == {"step": 3}
    unchanged(everything(*made("Muon", 3)), model, optimizer)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("part", [0.95, 0.5, 0.1, 0.0, None])
def test_an_old_one_that_is_truncated(
    kind: str, part: float | None, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved[kind], folder)
    without_manifest(folder)
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    path.unlink()
    if part is not None:
        path.write_bytes(whole[: int(part * len(whole))])
    assert str(path) in refused(folder, *made(kind, 1, seed=1))


# -- code in files


def test_code_in_the_metadata_is_not_run(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved["Muon"], folder)
    without_manifest(folder)
    metadata = checkpoint_files.read_metadata(folder)
    metadata.planner_data["more"] = PickledCode()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    message = refused(folder, *made("Muon", 1, seed=1))
    assert f"{folder / '.metadata'} cannot be read" in message
    assert "builtins.print" in message
    assert "run" not in capsys.readouterr().out


def test_code_in_a_value_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = made("Muon", 3)
    content = {
        "model": model.state_dict(),
        "optimizer": checkpoint.state_dict(optimizer),
        "extra": PickledCode(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save(content, checkpoint_id=tmp_path)
    assert "extra" in refused(tmp_path, *made("Muon", 1, seed=1))
    assert "run" not in capsys.readouterr().out


def test_metadata_that_points_out_of_its_folder(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved["Muon"], folder)
    without_manifest(folder)
    metadata = checkpoint_files.read_metadata(folder)
    for info in metadata.storage_data.values():
        info.relative_path = str(saved["Muon"] / info.relative_path)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "out of its folder" in refused(folder, *made("Muon", 1, seed=1))


# -- on several ranks


def spoil_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


SPOILED: dict[str, Callable[[Path], None]] = {
    "flip": spoil_flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "gone": lambda path: path.unlink(),
}


def several(folder: str, layout: str, kind: str) -> None:
    """Every file, spoiled in every way, on each rank; then the whole one."""
    import torch.distributed as dist

    options = {**RULES[kind], "kind": kind}
    with quiet():
        trial = OptimizedModel(layout, **options)
        for number in range(2):
            trial.step(number)
        spectral_dist.checkpoint.save(folder, trial.model, trial.optimizer, steps=2)
        other = OptimizedModel(layout, **options)
        other.step(0)
        before = other.weights(), other.states()
        names = sorted(json.loads(Path(folder, "spectral_dist.json").read_text())["files"])
        assert names == [".metadata", "__0_0.distcp", "__1_0.distcp"]
        for name in names:
            for how, spoil in SPOILED.items():
                path = Path(folder, name)
                whole = path.read_bytes()
                dist.barrier()
                if trial.rank == 0:
                    spoil(path)
                dist.barrier()
                with pytest.raises(ValueError, match="holds no" if how == "gone" and "meta" in name
                                   else name.replace(".", r"\.")):  # fmt: skip
                    spectral_dist.checkpoint.load(folder, other.model, other.optimizer)
                assert together.same(other.weights(), before[0])
                assert together.same(other.states(), before[1])
                dist.barrier()
                if trial.rank == 0:
                    path.write_bytes(whole)
                dist.barrier()
        assert spectral_dist.checkpoint.load(folder, other.model, other.optimizer) == {"steps": 2}
        assert together.same(other.weights(), trial.weights())
        assert together.same(other.states(), trial.states())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", RULES)
def test_every_rank_refuses_what_one_finds_damaged(layout: str, kind: str, tmp_path: Path) -> None:
    harness.run(2, several, str(tmp_path), layout, kind)


class Kind(enum.Enum):
    """As torch's metadata has one."""

    A = 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As Python 3.11.0 to 3.11.3 pickles it."""
        return getattr, (Kind, "A")


class Attribute:
    """What reads an attribute of a class that is no enum."""

    def __reduce__(self) -> Any:
        return getattr, (torch.Size, "numel")


def test_enums_as_older_pythons_pickle_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CLASSES", {*plain.CLASSES, (__name__, "Kind")})
    assert plain.Unpickler(io.BytesIO(pickle.dumps(Kind.A))).load() is Kind.A
    with pytest.raises(pickle.UnpicklingError, match="it reads attributes"):
        plain.Unpickler(io.BytesIO(pickle.dumps(Attribute()))).load()
