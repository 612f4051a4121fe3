"""A folder of folders that are built once and then read: shared safely, checked on use."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spectral_dist.launch import files

MANIFEST = "manifest.json"
LOCK = "lock"
BUILDING = re.compile(r"[0-9a-f]{24}(-\d+)?\.\w+")
"""Names of folders that are being built, or were when somebody was killed."""
DAY = 86400.0


def place(cache: Path, key: str) -> Path:
    """Return where to read or build what a key stands for; it need not be there.

    What this user or root has built is read; beside what another has planted under the name, this
    user has a folder of the same name and the user's number.

    Raises:
        ValueError: both names are taken by others.
    """
    reasons = []
    for name in (key, f"{key}-{os.getuid()}"):
        folder = cache / name
        why = _distrust(folder)
        if why is None:
            return folder
        reasons.append(f"{folder} is not used: {why}")
    raise ValueError(
        f"{'; '.join(reasons)}. Remove them, or set SPECTRAL_DIST_CACHE to a folder of your own"
    )


def _distrust(folder: Path) -> str | None:
    """Why others may have written what is here; None: nobody could, or there is nothing."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return "it is a symbolic link" if stat.S_ISLNK(status.st_mode) else "it is no folder"
    if status.st_uid not in (os.getuid(), 0):
        return f"it belongs to user {status.st_uid}, neither to you nor to root"
    if status.st_mode & 0o022:
        return "others than its owner may write to it"
    return None


def ready(cache: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Return the folder of a key, built or built again if it is damaged, and verified.

    Several processes may call this at once: each would build the same, the first rename stays.

    Args:
        cache: the folder of folders.
        key: 24 hexadecimal digits, of all that the content depends on.
        build: write the content into an empty folder, and return what its manifest says of it.

    Raises:
        ValueError: of ``place``, or the cache cannot be written to.
    """
    with _named_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        _clear(cache)
        folder = place(cache, key)
        if folder.name != key:
            _say(f"{cache / key} is not used: {_distrust(cache / key)}. Another is: {folder}")
        if not folder.exists():
            _build(folder, build)
            return folder
        problem = _problem(folder)
        if problem is None:
            return folder
        _say(f"{folder} is damaged: {problem}; it is built again")
        _discard(folder)
        _build(folder, build)
        return folder


def manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder, and compare the sizes of the files that it lists.

    Raises:
        ValueError: what is wrong.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(size) for name, (size, _) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    wrong = files.wrong_size(folder, sizes)
    if wrong:
        raise ValueError(wrong)
    return dict(content)


def _problem(folder: Path) -> str | None:
    """What is not as it was built; reads everything."""
    try:
        content = manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    digests = files.hashes(folder / name for name in content)
    for (name, (_, digest)), now in zip(content.items(), digests, strict=True):
        if digest != now:
            return f"{name} is not what was written"
    return None


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with (building / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends: nobody clears it away
            said = build(building)
            (building / LOCK).unlink()
            sizes = files.below(building)
            digests = files.hashes((building / name for name in sizes), sync=True)
            listed = {name: [sizes[name], digest] for name, digest in zip(sizes, digests)}  # noqa: B905
            files.replace(building / MANIFEST, json.dumps({**said, "files": listed}, indent=1))
            for path in building.iterdir():
                path.chmod(0o644)  # root builds for others, whatever the umask
            building.chmod(0o755)
            try:
                building.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same content
                    raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Out of the way at once: another process may read it or build it again."""
    away = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(away / "damaged")
    shutil.rmtree(away, ignore_errors=True)


def _clear(cache: Path) -> None:
    """Remove what this user's killed builds have left, and nothing that may be going on."""
    for folder in cache.iterdir():
        if not BUILDING.fullmatch(folder.name):
            continue
        try:
            status = folder.lstat()
            mine = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode)
            if mine and (_unlocked(folder) or time.time() - status.st_mtime > DAY):
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # done by another process


def _unlocked(folder: Path) -> bool:
    """Whether the process that was building here is no more."""
    path = folder / LOCK
    if not path.is_file():
        return False  # just begun, or just done
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@contextlib.contextmanager
def _named_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot use the cache of tokens {cache}: {error}; set SPECTRAL_DIST_CACHE to a folder"
            " that can be written to"
        ) from None


def _say(text: str) -> None:
    print(f"corpus: {text}", file=sys.stderr, flush=True)
