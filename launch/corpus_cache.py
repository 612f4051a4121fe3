"""Cache folders that are built once and then only read, by any number of processes and users."""

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


def folder_of(cache: Path, key: str) -> Path:
    """Return the folder in which to read or build the content of a key; it may not exist yet.

    Only a folder that this user or root has built is read. Beside one that somebody else has put
    under that name, this user has a second one, whose name ends with the user's number.

    Raises:
        ValueError: others have taken both names.
    """
    reasons = []
    for name in (key, f"{key}-{os.getuid()}"):
        folder = cache / name
        why = _why_distrusted(folder)
        if why is None:
            return folder
        reasons.append(f"{folder} is not used: {why}")
    raise ValueError(
        f"{'; '.join(reasons)}. Remove them, or set SPECTRAL_DIST_CACHE to a folder of your own"
    )


def _why_distrusted(folder: Path) -> str | None:
    """Return why others may have written a folder; None: nobody could, or it does not exist."""
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


def ensure_built(cache: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Return the verified folder of a key; build it if it is missing or damaged.

    Several processes may call this at once: each builds the same, and the first rename stays.

    Args:
        cache: the folder of all cached folders.
        key: 24 hexadecimal digits, a hash of all that the content depends on.
        build: writes the content into an empty folder and returns what its manifest shall say.

    Raises:
        ValueError: see ``folder_of``; or the cache cannot be written to.
    """
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        _clear(cache)
        folder = folder_of(cache, key)
        if folder.name != key:
            _print(
                f"{cache / key} is not used: {_why_distrusted(cache / key)}. Another is: {folder}"
            )
        if not folder.exists():
            _build(folder, build)
            return folder
        problem = _find_damage(folder)
        if problem is None:
            return folder
        _print(f"{folder} is damaged: {problem}; it is built again")
        _move_away_and_delete(folder)
        _build(folder, build)
        return folder


def manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder, and compare the sizes of the files that it lists.

    Raises:
        ValueError: the manifest cannot be read, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(size) for name, (size, _) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    size_problem = files.wrong_size(folder, sizes)
    if size_problem:
        raise ValueError(size_problem)
    return dict(content)


def _find_damage(folder: Path) -> str | None:
    """Return how a folder differs from its manifest; None: it does not. All files are read."""
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
    """Build a folder under a temporary name, and rename it when it is complete."""
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with (building / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends: none clears the folder away
            content = build(building)
            (building / LOCK).unlink()
            sizes = files.sizes_below(building)
            digests = files.hashes((building / name for name in sizes), sync=True)
            entries = {name: [sizes[name], digest] for name, digest in zip(sizes, digests)}  # noqa: B905
            files.replace(building / MANIFEST, json.dumps({**content, "files": entries}, indent=1))
            for path in building.iterdir():
                path.chmod(0o644)  # for other users to read, whatever root's umask
            building.chmod(0o755)
            try:
                building.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same content
                    raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _move_away_and_delete(folder: Path) -> None:
    """Rename a damaged folder at once, so that nobody reads it or waits for it, and delete it."""
    trash = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(trash / "damaged")
    shutil.rmtree(trash, ignore_errors=True)


def _clear(cache: Path) -> None:
    """Remove what killed builds of this user have left, and nothing that may be in progress."""
    for folder in cache.iterdir():
        if not BUILDING.fullmatch(folder.name):
            continue
        try:
            status = folder.lstat()
            is_ours = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode)
            if is_ours and (_builder_has_ended(folder) or time.time() - status.st_mtime > DAY):
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process has removed it


def _builder_has_ended(folder: Path) -> bool:
    """Return whether the process that was building a folder has ended, and so released its lock."""
    path = folder / LOCK
    if not path.is_file():
        return False  # it has just begun, or is just done
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@contextlib.contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """Raise a ValueError that says what to do, in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot use the cache of tokens {cache}: {error}; set SPECTRAL_DIST_CACHE to a folder"
            " that can be written to"
        ) from None


def _print(text: str) -> None:
    print(f"corpus: {text}", file=sys.stderr, flush=True)
