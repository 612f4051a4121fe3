"""Text to train on, and the reading of it from .txt and .jsonl files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_dist.launch import files

DOCUMENT_CHARS = 1 << 16  # a text file is cut at line ends into documents of about this size
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Text:
    """A text to train on.

    Attributes:
        identity: a value for JSON, another one for any other text.
        documents: returns the documents as (name, text), the same at each call. A name decides
            whether its document is for training or validation.
    """

    identity: Any
    documents: Callable[[], Iterable[tuple[str, str]]]


@dataclass(frozen=True)
class Source:
    """One file of text: its name, which decides the split, and its size in bytes."""

    name: str
    path: Path
    size: int


def text_of(sources: Sequence[Source]) -> Text:
    """Return the text of files, which are hashed now, and read for each call of ``documents``.

    Raises:
        OSError: a file cannot be read.
    """
    digests = files.hashes(source.path for source in sources)
    identity = [[source.name, digest] for source, digest in zip(sources, digests, strict=True)]
    return Text(identity, lambda: (pair for source in sources for pair in documents(source)))


def sources(path: Path) -> list[Source]:
    """Return a .txt or .jsonl file, or all those below a folder.

    Raises:
        ValueError: there is none, or one is empty, or a link to nothing.
    """
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and not p.is_dir())
        if not below:
            raise ValueError(f"no .txt or .jsonl file below {path}")
        return [_source(file.relative_to(path).as_posix(), file) for file in below]
    if path.suffix not in SUFFIXES and path.exists():
        raise ValueError(f"{path}: expected a .txt or .jsonl file, or a directory of them")
    return [_source(path.name, path)]


def _source(name: str, path: Path) -> Source:
    """Return the ``Source`` of one file, or raise a ValueError if it cannot be one."""
    if not path.exists():
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link to {path.readlink()}, which is not there: remove it"
            )
        raise ValueError(f"no such file or directory: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: remove it, or write its text to one")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: remove it, or write its text again")
    return Source(name, path, size)


def documents(source: Source) -> Iterator[tuple[str, str]]:
    """Iterate over the documents of a file: (name, text).

    A document is a whole .py file, a line of a .jsonl file, or DOCUMENT_CHARS of a .txt file.

    Raises:
        ValueError: a .jsonl line without a string under "text", or a line that is not UTF-8; names
            file and line.
    """
    if source.path.suffix == ".py":  # some of Python's own files are in other encodings
        yield source.name, source.path.read_bytes().decode(errors="replace")
        return
    with source.path.open(encoding="utf-8", newline="") as file:
        try:
            if source.path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        text = _text_field(line, f"{source.path}:{number}")
                        yield f"{source.name}:{number}", text
            else:
                number = 0
                while lines := file.readlines(DOCUMENT_CHARS):
                    yield f"{source.name}#{number}", "".join(lines)
                    number += 1
        except UnicodeDecodeError:
            raise _utf8_error(source.path) from None


def _utf8_error(path: Path) -> ValueError:
    """Return the error that names the first line of a file that is not UTF-8."""
    with path.open("rb") as file:  # whose lines end between characters in UTF-8, too
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return ValueError(
                    f"{path}:{number}: {error.object[error.start : error.end]!r} is not UTF-8;"
                    f" convert the file, as by iconv -f latin1 -t utf-8"
                )
    return ValueError(f"{path} is not UTF-8")


def _text_field(line: str, where: str) -> str:
    """Return the string under "text" of a line of JSON; ``where`` is for the error."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with a string under "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} is half a character") from None
    return text


def digest(purpose: str, name: str) -> int:
    """Return a 64-bit hash of a name, another one for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big")
