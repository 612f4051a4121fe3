"""The corpus cache: damage is noticed and mended, and nobody else's folder is read."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from spectral_dist.launch import corpus, corpus_cache


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        words = " ".join(f"word{(i * 7 + k) % 31}" for k in range(60))
        (folder / f"{i:02}.txt").write_text(words + "\n", encoding="utf-8")
    return folder


def load(data: Path, cache: Path) -> list[int]:
    return corpus.load([data], 320, cache).train.tolist()


def halved(folder: Path) -> None:
    size = (folder / "train.bin").stat().st_size
    os.truncate(folder / "train.bin", size // 2)


def flipped(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[10] ^= 1
    (folder / "train.bin").write_bytes(content)


def emptied(folder: Path) -> None:
    os.truncate(folder / "validation.bin", 0)


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def empty_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 0)


def nothing_in_it(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir(mode=0o755)


DAMAGES = (halved, flipped, emptied, without_tokenizer, empty_manifest, nothing_in_it)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_built_again(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    cache = tmp_path / "cache"
    tokens = load(data, cache)
    (folder,) = cache.iterdir()
    damage(folder)
    assert load(data, cache) == tokens
    assert "is damaged: " in capsys.readouterr().err
    assert list(cache.iterdir()) == [folder]
    assert load(data, cache) == tokens
    assert capsys.readouterr().err == ""


def test_text_changed_with_size_and_time_kept(tmp_path: Path, data: Path) -> None:
    path = data / "03.txt"
    before, key = path.stat(), corpus.prepare([data], 320, tmp_path / "cache")
    path.write_text(path.read_text().replace("word1", "WORD1"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert corpus.prepare([data], 320, tmp_path / "cache") != key


def test_the_same_text_elsewhere_is_the_same(tmp_path: Path, data: Path) -> None:
    key = corpus.prepare([data], 320, tmp_path / "cache")
    shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    assert corpus.prepare([tmp_path / "copy"], 320, tmp_path / "cache") == key


def linked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    return "it is a symbolic link"


def dangling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("nowhere"))
    return "it is a symbolic link"


def of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
    return f"it belongs to user {folder.stat().st_uid}, neither to you nor to root"


def writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder.chmod(0o777)
    return "others than its owner may write to it"


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(folder)
    folder.touch()
    return "it is no folder"


@pytest.mark.parametrize("plant", [linked, dangling, of_another_user, writable, a_file])
def test_what_another_may_have_planted_is_not_read(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    plant: Any,
) -> None:
    cache = tmp_path / "cache"
    tokens = load(data, cache)
    (folder,) = cache.iterdir()
    if (folder / "train.bin").exists():
        (folder / "train.bin").write_bytes(bytes(1000))
    why = plant(folder, monkeypatch)
    assert load(data, cache) == tokens
    assert why in capsys.readouterr().err
    other = cache / f"{folder.name}-{os.getuid()}"
    assert (other / "train.bin").is_file()
    shutil.rmtree(other)
    other.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=f"{folder} is not used: .*set SPECTRAL_DIST_CACHE"):
        load(data, cache)


def test_all_can_read_it_and_nobody_else_writes(tmp_path: Path, data: Path) -> None:
    former = os.umask(0o077)
    try:
        load(data, tmp_path / "cache")
    finally:
        os.umask(former)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_what_killed_builds_left_is_removed(tmp_path: Path, data: Path) -> None:
    cache = tmp_path / "cache"
    key = corpus.prepare([data], 320, cache)
    killed, going_on, old, just_begun = (cache / f"{key}.{n}" for n in ("ab12", "cd", "ef", "gh"))
    for folder in (killed, going_on, old, just_begun):
        folder.mkdir()
    for folder in (killed, going_on):
        (folder / corpus_cache.LOCK).touch()
    os.utime(old, (0, 0))
    (cache / "mine.txt").touch()
    with (going_on / corpus_cache.LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        corpus.prepare([data], 320, cache)
    assert {path.name for path in cache.iterdir()} == {
        key, going_on.name, just_begun.name, "mine.txt",
    }  # fmt: skip


def test_a_cache_that_cannot_be_written(tmp_path: Path, data: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"cannot use the cache of tokens .*SPECTRAL_DIST_CACHE"):
        load(data, tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"new\.txt is empty: remove it"),
        ("caf\xe9 au lait".encode("latin1"), r"new\.txt:1: b'\\xe9' is not UTF-8; convert"),
        (b"good\n" * 40000 + b"\xff\n", r"new\.txt:40001: b'\\xff' is not UTF-8"),
        (b"cut \xc3", r"new\.txt:1: b'\\xc3' is not UTF-8"),
        (None, r"new\.txt is a link to .*nowhere, which is not there: remove it"),
    ],
)
def test_text_that_cannot_be_read_is_named(
    tmp_path: Path, data: Path, content: bytes | None, said: str
) -> None:
    path = data / "new.txt"
    if content is None:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(content)
    for given in (data, path):
        with pytest.raises(ValueError, match=said):
            corpus.load([given], 320, tmp_path / "cache")


def test_half_a_character_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: '\\ud800' is half a character"):
        corpus.load([path], 320, tmp_path / "cache")
    path.write_bytes(b'{"text": "good"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: b'\\xe9' is not UTF-8"):
        corpus.load([path], 320, tmp_path / "cache")
