"""Prepare the text to train on: collect, split, tokenize and cache it.

The default corpus is the Python source that every installation already has (standard library and
torch), so that a first run downloads nothing. `load` returns memory-mapped tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from spectral_dist.launch import corpus_cache, files

FORMAT = 2  # part of the cache key: raise it when the same input gives other tokens
END = "<|endoftext|>"
VALIDATION_PERMILLE = 20  # of the documents, for validation
DOCUMENT_CHARS = 1 << 16  # a text file is cut at line ends into documents of about this size
SAMPLE_BYTES = 8 << 20  # of training text, for training the tokenizer
PYTHON_BYTES = 48 << 20  # of the default corpus: tokenizing it all would make a first run wait
PYTHON_FILE_BYTES = 200_000  # above it are mostly generated tables
PYTHON_SKIPPED = {"site-packages", "dist-packages", "encodings"}  # not the standard library; tables
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Source:
    """One file of text: its name, which decides the split, and its size in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Corpus:
    """A tokenized text, split into training and validation.

    Attributes:
        train, validation: the tokens, 1-D and unsigned.
        tokenizer: made of the training text.
        token_bytes: the bytes of text that each token of the vocabulary stands for.
        manifest: what the cache says of its files.
        key: hash of all that the tokens depend on.
    """

    train: NDArray[np.unsignedinteger[Any]]
    validation: NDArray[np.unsignedinteger[Any]]
    tokenizer: Tokenizer
    token_bytes: NDArray[np.int64]
    manifest: dict[str, Any]
    key: str


def load(paths: Sequence[Path], vocab_size: int, cache: Path | None = None) -> Corpus:
    """Return the tokens of a text, which are built at first use; see ``prepare``."""
    return read(prepare(paths, vocab_size, cache), cache)


def prepare(paths: Sequence[Path], vocab_size: int, cache: Path | None = None) -> str:
    """Build the tokens of a text in the cache, unless they are there, and return their key.

    The text is read and hashed each time, because sizes and times of files would miss changes and
    differ between machines. That takes about 0.6 s of CPU time for a GB, once on each node.

    Args:
        paths: files or folders of text; none: the default corpus.
        vocab_size: of the tokenizer.
        cache: the folder of cached tokens; None: ``cache_folder()``.

    Raises:
        ValueError: no file, unreadable files or lines, too little text, a vocabulary below 257, or
            no cache to write to.
    """
    if vocab_size < 257:
        raise ValueError(f"a byte-level vocabulary needs 257 entries or more, not {vocab_size}")
    try:
        sources = text_sources(paths) if paths else python_sources()
        key = cache_key(sources, vocab_size)
    except OSError as error:
        raise ValueError(f"cannot read the text: {error}") from None

    def build(folder: Path) -> dict[str, Any]:
        return _build(sources, vocab_size, folder)

    corpus_cache.ensure_built(cache or cache_folder(), key, build)
    return key


def read(key: str, cache: Path | None = None) -> Corpus:
    """Open the tokens that ``prepare`` has built.

    Raises:
        ValueError: the cached files have been removed or have changed since.
    """
    folder = corpus_cache.folder_of(cache or cache_folder(), key)
    try:
        manifest = corpus_cache.manifest(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder} has changed since it was checked: {error}; start again"
        ) from None
    dtype = np.dtype(manifest["dtype"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Corpus(
        train=np.memmap(folder / "train.bin", dtype=dtype, mode="r"),
        validation=np.memmap(folder / "validation.bin", dtype=dtype, mode="r"),
        tokenizer=tokenizer,
        token_bytes=byte_lengths(tokenizer),
        manifest=manifest,
        key=key,
    )


def cache_folder() -> Path:
    """Return the folder of cached tokens: $SPECTRAL_DIST_CACHE, or ~/.cache/spectral_dist."""
    return Path(os.environ.get("SPECTRAL_DIST_CACHE") or "~/.cache/spectral_dist").expanduser()


def cache_key(sources: Sequence[Source], vocab_size: int) -> str:
    """Return a hash of everything that the tokens depend on, the text itself included."""
    digests = files.hashes(source.path for source in sources)
    names_and_digests = [
        [source.name, digest] for source, digest in zip(sources, digests, strict=True)
    ]
    text = json.dumps([FORMAT, vocab_size, names_and_digests])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def python_sources() -> list[Source]:
    """Return a fixed sample of PYTHON_BYTES of the .py files of the standard library and torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ValueError("the default corpus needs an installed torch: give --data instead")
    roots = {"python": Path(sysconfig.get_path("stdlib")), "torch": Path(spec.origin).parent}
    sources = []
    for label, root in roots.items():
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in PYTHON_SKIPPED]
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                size = path.stat().st_size
                if 0 < size <= PYTHON_FILE_BYTES:
                    name = f"{label}/{path.relative_to(root).as_posix()}"
                    sources.append(Source(name, path, size))
    # The order of a hash mixes both trees, and cutting it off leaves a fair sample of both.
    sources.sort(key=lambda source: _digest("order", source.name))
    sample, total = [], 0
    for source in sources:
        total += source.size
        if total > PYTHON_BYTES:
            break
        sample.append(source)
    if not sample:
        raise ValueError(f"no Python source under {', '.join(map(str, roots.values()))}")
    return sample


def text_sources(paths: Sequence[Path]) -> list[Source]:
    """Return the .txt and .jsonl files among the paths, and all those below them.

    Raises:
        ValueError: there is none, or one is empty, or a link to nothing.
    """
    sources = []
    for path in paths:
        if path.is_dir():
            files_below = sorted(
                p for p in path.rglob("*") if p.suffix in SUFFIXES and not p.is_dir()
            )
            if not files_below:
                raise ValueError(f"no .txt or .jsonl file below {path}")
            sources += [_source(file.relative_to(path).as_posix(), file) for file in files_below]
        elif path.suffix not in SUFFIXES and path.exists():
            raise ValueError(f"{path}: expected a .txt or .jsonl file, or a directory of them")
        else:
            sources.append(_source(path.name, path))
    return sources


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


def validation_names(names: Sequence[str]) -> set[str]:
    """Return the names of the documents that are held out for validation.

    They are those whose name hashes low, and never none or all of them.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(set(names)) < 2:
        raise ValueError(
            f"too little text: {len(set(names))} document(s), and both training and validation "
            f"need one (a line of .jsonl is a document, or {DOCUMENT_CHARS} characters of .txt)"
        )
    held_out = {name for name in names if _digest("split", name) % 1000 < VALIDATION_PERMILLE}
    if not held_out or len(held_out) == len(set(names)):
        held_out = {min(names, key=lambda name: (_digest("split", name), name))}
    return held_out


def _digest(purpose: str, name: str) -> int:
    """Return a 64-bit hash of a name, another one for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big")


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the bytes of text that each token stands for, (vocabulary,); end-of-text has 0."""
    # A byte-level vocabulary writes every byte as one character.
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if token == END else len(token)
    return lengths


def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """Convert a mean loss to bits per byte of text.

    Args:
        nats: mean loss per token.
        tokens: number of tokens.
        size: bytes of text that the tokens stand for.
    """
    return float(nats * tokens / (np.log(2) * size))


def _build(sources: Sequence[Source], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Write the tokenizer and the tokens into a folder; return the content of its manifest."""
    names, sample = _sample_documents(sources)
    held_out = validation_names(names)
    training = [text for name, text in sample if name not in held_out]
    tokenizer = train_tokenizer(training, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {**_encode(sources, tokenizer, held_out, folder), "vocab_size": vocab_size}


def _sample_documents(sources: Sequence[Source]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of all documents, and the first SAMPLE_BYTES of them as (name, text)."""
    names, sample, size = [], [], 0
    for source in sources:
        for name, text in documents(source):
            if not text:
                continue
            names.append(name)
            if size < SAMPLE_BYTES:
                sample.append((name, text))
                size += len(text.encode())
    return names, sample


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    It can encode any text, and the bytes of its tokens add up to those of the text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(
    sources: Sequence[Source], tokenizer: Tokenizer, held_out: set[str], folder: Path
) -> dict[str, Any]:
    """Write train.bin and validation.bin, and return their dtype and counts."""
    # Text that happens to spell the end-of-text token stays text: only ``end`` is the token.
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(END)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    parts = {part: {"documents": 0, "bytes": 0, "tokens": 0} for part in ("train", "validation")}
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as held:
        files = {"train": train, "validation": held}
        for batch in _batches(sources):
            encoded = tokenizer.encode_batch_fast([text for _, text in batch])
            for (name, text), encoding in zip(batch, encoded, strict=True):
                part = "validation" if name in held_out else "train"
                files[part].write(np.array([*encoding.ids, end], dtype).tobytes())
                counts = parts[part]
                counts["documents"] += 1
                counts["bytes"] += len(text.encode())
                counts["tokens"] += len(encoding.ids) + 1
    tokenizer.encode_special_tokens = False
    return {"dtype": dtype.name, **parts}


def _batches(sources: Sequence[Source], size: int = 1 << 21) -> Iterator[list[tuple[str, str]]]:
    """Iterate over lists of documents, about ``size`` characters each: enough for all threads."""
    batch, total = [], 0
    for source in sources:
        for name, text in documents(source):
            if text:
                batch.append((name, text))
                total += len(text)
            if total >= size:
                yield batch
                batch, total = [], 0
    if batch:
        yield batch
