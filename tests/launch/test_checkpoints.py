"""Checkpoints of a run: `latest` names a whole one, a damaged one is noticed, settings stay."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_dist.launch import checkpoints, files, run_folder
from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.run_folder import Resume, RunFolder

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class FileEngine:
    """Writes three files, and remembers what it has read."""

    def __init__(self) -> None:
        self.loaded: Path | None = None

    def write(self, target: Path) -> None:
        (target / "model.pt").write_bytes(b"m" * 100)
        (target / "state").mkdir()
        (target / "state/0.pt").write_bytes(b"s" * 10)
        (target / "empty").touch()

    def read(self, source: Path) -> None:
        self.loaded = source


def save(folder: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        checkpoints.save(FileEngine(), ALONE, folder, {"step": step, "seed": 0}, keep)  # type: ignore[arg-type]


def load(folder: Path, **now: Any) -> tuple[str, list[str]]:
    checkpoint, notes = checkpoints.find(folder)
    assert checkpoint is not None
    engine: Any = FileEngine()
    checkpoints.load(engine, ALONE, checkpoint, now)
    assert engine.loaded == checkpoint.folder
    return checkpoint.folder.name, notes


def test_the_newest_is_taken(tmp_path: Path) -> None:
    assert checkpoints.find(tmp_path / "absent") == (None, [])
    save(tmp_path, 2, 4)
    assert (tmp_path / "latest").read_text() == "step_000004"
    assert load(tmp_path) == ("step_000004", [])
    checkpoints.name_latest(tmp_path / "step_000002")  # by hand, to go back
    assert load(tmp_path) == ("step_000002", [])


def cut(folder: Path) -> None:
    os.truncate(folder / "model.pt", 50)


def emptied(folder: Path) -> None:
    os.truncate(folder / "state/0.pt", 0)


def removed(folder: Path) -> None:
    (folder / "empty").unlink()


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 30)


def empty_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 0)


def other_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[5]")


def other_step(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 6', '"step": 7'))


def gone(folder: Path) -> None:
    checkpoints.remove(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "model.pt has 50 bytes of 100"),
        (emptied, "state/0.pt has 0 bytes of 10"),
        (removed, "empty is missing"),
        (without_manifest, "it has no manifest.json"),
        (cut_manifest, "manifest.json cannot be read"),
        (empty_manifest, "manifest.json cannot be read"),
        (other_manifest, "manifest.json cannot be read"),
        (other_step, "manifest.json is not what was saved"),
        (gone, "it is missing"),
    ],
)
def test_of_a_damaged_one_the_one_before_is_taken(tmp_path: Path, damage: Any, said: str) -> None:
    save(tmp_path, 2, 4, 6)
    damage(tmp_path / "step_000006")
    name, notes = load(tmp_path)
    assert name == "step_000004"
    assert f"step_000006 is damaged: {said}" in notes[0]
    assert "step_000004 is taken, the newest whole checkpoint" in notes[-1]
    for other in ("step_000002", "step_000004"):
        cut(tmp_path / other)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*step_000006"):
        checkpoints.find(tmp_path)


@pytest.mark.parametrize("text", ["", "../../x", "/etc", "step_000002/../..", "\x00\xff", "latest"])
def test_latest_leads_nowhere_else(tmp_path: Path, text: str) -> None:
    save(tmp_path, 2)
    (tmp_path / "latest").write_text(text)
    name, notes = load(tmp_path)
    assert name == "step_000002"
    assert "latest is damaged: it holds" in notes[0]


def test_an_unfinished_first_save_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_000002").mkdir()
    (tmp_path / "step_000002/model.pt").write_text("half")
    assert checkpoints.find(tmp_path)[0] is None
    save(tmp_path, 2)
    assert sorted(files.sizes_below(tmp_path / "step_000002")) == [
        "empty", "manifest.json", "model.pt", "state/0.pt",
    ]  # fmt: skip


def test_what_was_there_of_the_step_goes(tmp_path: Path) -> None:
    """Of more ranks, say: it would be loaded with the rest."""
    save(tmp_path, 2)
    (tmp_path / "step_000002/rank_3.pt").touch()
    save(tmp_path, 2)
    assert not (tmp_path / "step_000002/rank_3.pt").exists()


def test_why_a_disk_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own error has no word of it."""

    def full(engine: FileEngine, target: Path) -> None:
        raise RuntimeError("unexpected pos 704 vs 598")

    def none_left(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path, 2)
    monkeypatch.setattr(FileEngine, "write", full)
    with pytest.raises(RuntimeError, match="unexpected pos"):  # there is room: it is another thing
        save(tmp_path, 4)
    monkeypatch.setattr(files, "check_writable", none_left)
    with pytest.raises(OSError, match=r"No space left on device: .*'.*/step_000004'"):
        save(tmp_path, 4)
    assert load(tmp_path) == ("step_000002", [])


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "step_000002/state/0.pt").write_bytes(b"sssssssssr")
    with pytest.raises(ValueError, match=r"state/0\.pt is not what was saved"):
        load(tmp_path)


def test_some_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, 8)
    (tmp_path / "step_000003").mkdir()  # of a save that was killed
    (tmp_path / "step_000099").mkdir()  # a later one than those that count
    save(tmp_path, 10, keep=2)
    assert [path.name for path in checkpoints.steps(tmp_path)] == [
        "step_000099", "step_000010", "step_000008",
    ]  # fmt: skip
    assert load(tmp_path) == ("step_000010", [])
    save(tmp_path, 4, keep=1)  # after going back: never the one that `latest` names
    assert load(tmp_path) == ("step_000004", [])


SAVED = {
    "step": 5,
    "seed": 0,
    "model": {"rope": {"theta": 1e4}, "heads": 4, "eps": 1e-6},
    "optimizer": {"type": "Muon", "betas": [0.9, 0.95], "scalars": None},
    "clip": 1.0,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "its seed was 0, now it is 1"),
        ({"seed": False}, "its seed was 0, now it is false"),
        ({"clip": 0.5}, "its clip was 1.0, now it is 0.5"),
        ({"model": {**SAVED["model"], "rope": {"theta": 5e5}}}, r"model.rope.theta was 10000.0, n"),  # type: ignore[dict-item]
        ({"model": {"rope": {"theta": 1e4}, "heads": 4}}, "model.eps was 1e-06, now it is not set"),
        ({"optimizer": {"type": "Muon", "betas": [0.9, 0.99], "scalars": None}}, "optimizer.betas"),
        ({"optimizer": {**SAVED["optimizer"], "momentum": 0.9}}, "momentum was not set, now it is"),  # type: ignore[dict-item]
    ],
)
def test_a_changed_setting_is_named_with_both_values(change: dict[str, Any], said: str) -> None:
    now = {**{name: value for name, value in SAVED.items() if name != "step"}, **change}
    with pytest.raises(ValueError, match=f"cannot resume a: its .*{said.removeprefix('its ')}"):
        checkpoints.compare(Path("a"), SAVED, now)


def test_equal_settings_are_equal_however_they_are_written() -> None:
    now = {**SAVED, "optimizer": {"scalars": None, "type": "Muon", "betas": (0.9, 0.95)}}
    checkpoints.compare(Path("a"), SAVED, now)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    target.write_text("theirs")
    for name in ("latest", "summary.json"):
        (tmp_path / name).symlink_to(target)
        files.replace(tmp_path / name, "ours")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "ours"
    assert target.read_text() == "theirs"
    (tmp_path / f".latest.abc{files.PARTIAL_SUFFIX}").write_text("killed")
    files.remove_partial_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "summary.json", "theirs"]


def test_how_a_folder_is_begun(tmp_path: Path) -> None:
    def opened(resume: Resume) -> tuple[str | None, list[str]]:
        folder = RunFolder(tmp_path, resume)
        try:
            checkpoint, notes = folder.open()
        finally:
            folder.close()
        return checkpoint and checkpoint.folder.name, notes

    assert opened(Resume.never) == opened(Resume.auto) == (None, [])
    with pytest.raises(ValueError, match=r"no checkpoint to resume in .*; --resume auto would"):
        opened(Resume.must)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints/step_000001").mkdir()
    with pytest.raises(ValueError, match="holds a run: pass --resume or another --out"):
        opened(Resume.never)
    assert "ended before its first checkpoint: anew" in opened(Resume.auto)[1][-1]
    save(tmp_path / "checkpoints", 3, 6)
    (tmp_path / "summary.json").touch()
    assert opened(Resume.auto)[0] == opened(Resume.must)[0] == "step_000006"
    assert not (tmp_path / "summary.json").exists()  # it is of a run that is done
    cut(tmp_path / "checkpoints/step_000006")
    assert opened(Resume.auto)[0] == "step_000003"
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000003"


def test_one_run_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.2)
    first, second = (RunFolder(tmp_path, Resume.auto) for _ in range(2))
    first.open()
    with pytest.raises(ValueError, match=rf"goes on now \(process {os.getpid()} on "):
        second.open()
    second.close()
    first.close()  # as when its process ends
    second.open()
    second.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to --out"):
        RunFolder(tmp_path / "file", Resume.never).open()
    (tmp_path / "run.lock").symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to --out"):
        RunFolder(tmp_path, Resume.never).open()


def test_a_manifest_is_readable_by_others(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_000001/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["run"] == {"step": 1, "seed": 0}
    assert path.stat().st_mode & 0o777 == 0o644
    del manifest["sha256"]  # as of an older release
    path.write_text(json.dumps(manifest))
    assert load(tmp_path) == ("step_000001", [])
