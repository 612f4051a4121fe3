"""Write files so that a kill at any moment leaves the old or the new content, and hash them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".part"
"""The end of the name of a file that is being written."""
LARGEST = 2.0**63
"""What an int64 tensor cannot hold, nor anything above it."""
THREADS = 4
"""Threads of one rank that hashes: files are read and hashed outside of Python's lock."""


def whole_number(text: str) -> int | float:
    """Return the integer that a text spells; a float if no tensor can hold it (1 with 30 zeros)."""
    value = float(text)
    return int(text) if abs(value) < LARGEST else value


def read_json(path: Path) -> Any:
    """Read a JSON file, with integers as ``whole_number`` has them.

    Raises:
        ValueError: it cannot be read, is no JSON, or has a key twice, of which one would be lost.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated_key = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {repeated_key!r} is there twice")
        return content

    try:
        return json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=without_repeats,
            parse_int=whole_number,
        )
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from None


def replace(path: Path, content: str | bytes) -> None:
    """Write the content of a file to a temporary one beside it, sync it to disk, and rename it.

    A symbolic link of that name is replaced, and what it points to is left alone.
    """
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # only its owner can read a temporary file
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Delete what a killed ``replace`` left in a folder; nobody else may be writing to it."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, size: int = 1 << 20) -> None:
    """Write a file of ``size`` bytes into a folder, and remove it.

    Raises:
        OSError: why there can be none, for example because the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def sizes_below(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by its path relative to the folder."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wrong_size(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """Return which of the files is missing or has another size; None: all are right.

    Args:
        folder: the files' folder.
        sizes: in bytes, by path relative to the folder.
    """
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        actual = path.stat().st_size
        if actual != size:
            return f"{name} has {actual:,} bytes of {size:,}"
    return None


def hashes(paths: Iterable[Path], *, sync: bool = False) -> list[str]:
    """Return the SHA-256 of each file; with ``sync`` the file is on disk afterwards."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(digest, paths))
