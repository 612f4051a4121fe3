"""Files that a kill at any moment leaves as they were or as they should be, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PART = ".part"
"""How the name of a file that is being written ends."""
LARGEST = 2.0**63
THREADS = 4
"""Of one rank that hashes: a file is read and hashed outside of Python's lock."""


def whole_number(text: str) -> int | float:
    """The whole number that a text says; a float if no tensor holds it, as 1 with 30 zeros."""
    value = float(text)
    return int(text) if abs(value) < LARGEST else value


def read_json(path: Path) -> Any:
    """What a JSON file says; its whole numbers are ``whole_number``s.

    Raises:
        ValueError: it cannot be read, is no JSON, or has a key twice, of which one would be lost.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} is there twice")
        return content

    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_int=whole_number
        )
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from None


def replace(path: Path, content: str | bytes) -> None:
    """Make a file hold this: written beside it, on disk, then renamed.

    A link of that name is replaced, and what it points to is left alone.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # a temporary file is its owner's alone
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Delete what ``replace`` left in a folder when it was killed; nobody else may write there."""
    for path in folder.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe(folder: Path, size: int = 1 << 20) -> None:
    """Write a file of so many bytes, and remove it.

    Raises:
        OSError: why there can be none: the disk is full, say.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def below(folder: Path) -> dict[str, int]:
    """Return the size of every file below a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wrong_size(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """Say which of the files is not there or has not its size; None: all have."""
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        there = path.stat().st_size
        if there != size:
            return f"{name} has {there:,} bytes of {size:,}"
    return None


def hashes(paths: Iterable[Path], *, sync: bool = False) -> list[str]:
    """Return the SHA-256 of each file; with ``sync`` it is on disk afterwards."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(digest, paths))
