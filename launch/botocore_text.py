"""The default corpus: the documentation of AWS services in English, from one release of botocore.

It is the same text on every machine: the release and the SHA-256 of its text are fixed here and
checked. The package's files are read; the package is not imported.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

from spectral_dist.launch.text_files import Text, digest

RELEASE = "1.43.11"
SHA256 = "15893ec3d496d1ac2dcb55dbd396239916ea9e874144bc0668c3b47da2cf2747"
"""Of the names and texts of all documents, in their order."""
SHORTEST = 40  # characters of a paragraph; below are labels: "ACTIVE", "The name."
SERVICE_FILES = ("service-2.json.gz", "service-2.json")  # as in the wheel, or unpacked
BLOCKS = {"p", "li", "ul", "ol", "dl", "dt", "dd", "note", "important", "pre", "br"}
INSTEAD = "or give --data code (the installed Python source), or --data with text of your own"


def text() -> Text:
    """Return the default corpus, of which nothing is read before its documents are asked for."""
    return Text(["botocore", RELEASE, SHA256], functools.cache(_checked_documents))


def _checked_documents() -> list[tuple[str, str]]:
    """Return the documents of the installed botocore.

    Raises:
        ValueError: it is missing, another release, damaged, or its text is not the one that is
            meant.
    """
    folder = data_folder()
    pairs = list(documents(folder))
    actual = sha256(pairs)
    if actual != SHA256:
        raise ValueError(
            f"the text in {folder} has the SHA-256 {actual}, and that of botocore {RELEASE} has"
            f" {SHA256}: run pip install --force-reinstall --no-deps botocore=={RELEASE}, {INSTEAD}"
        )
    return pairs


def data_folder() -> Path:
    """Return the folder in which the installed botocore describes its services.

    Raises:
        ValueError: botocore is not installed, or another release of it.
    """
    try:
        distribution = metadata.distribution("botocore")
    except metadata.PackageNotFoundError:
        installed = "none"
    else:
        installed = distribution.version
        if installed == RELEASE:
            return Path(str(distribution.locate_file("botocore/data")))
    raise ValueError(
        f"the default corpus is the text of botocore {RELEASE}, and {installed} is installed: run"
        f" pip install botocore=={RELEASE}, {INSTEAD}"
    )


def sha256(pairs: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 of names and texts of documents."""
    content = hashlib.sha256()
    for name, document in pairs:
        content.update(f"{name}\n{document}\n".encode())
    return content.hexdigest()


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Iterate over the services: (name, text), a document each.

    The text is that of the service's newest description, a paragraph that an earlier service had
    left out: so the services that are held out for validation share none with the others.

    Args:
        folder: botocore/data.

    Raises:
        ValueError: a file cannot be read.
    """
    seen: set[str] = set()
    # The order of a hash, as the tokenizer is trained on the first documents.
    for path in sorted(_newest_files(folder), key=lambda path: digest("order", _service(path))):
        paragraphs = []
        for paragraph in plain_paragraphs("<p>".join(_documentation(_read(path)))):
            if len(paragraph) >= SHORTEST and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            yield _service(path), "\n\n".join(paragraphs) + "\n"


def _newest_files(folder: Path) -> list[Path]:
    """Return the newest description of each service, data/SERVICE/DATE/service-2.json.gz."""
    newest: dict[str, Path] = {}
    for path in sorted(path for name in SERVICE_FILES for path in folder.glob(f"*/*/{name}")):
        newest[_service(path)] = path
    return list(newest.values())


def _service(path: Path) -> str:
    """Return the name of the service that a file describes."""
    return path.parents[1].name


def _read(path: Path) -> Any:
    """Read a file of JSON, which may be compressed.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"cannot read the text of botocore in {path}: {error}: run pip install"
            f" --force-reinstall --no-deps botocore=={RELEASE}, {INSTEAD}"
        ) from None


def _documentation(node: Any) -> Iterator[str]:
    """Iterate over the strings under "documentation" in a description, in the file's order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def plain_paragraphs(html: str) -> list[str]:
    """Return the paragraphs of HTML as plain text, each with single spaces and no line ends."""
    reader = _TextReader()
    reader.feed(html)
    reader.close()
    paragraphs = (" ".join("".join(pieces).split()) for pieces in reader.paragraphs)
    return [paragraph for paragraph in paragraphs if paragraph]


class _TextReader(HTMLParser):
    """A parser that collects text, and begins a paragraph where an element of BLOCKS does or ends.

    Attributes:
        paragraphs: the pieces of text of each paragraph; some have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[list[str]] = [[]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self.paragraphs.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.paragraphs.append([])

    def handle_data(self, data: str) -> None:
        self.paragraphs[-1].append(data)
