"""Prepare the text to train on: split, tokenize and cache it. `load` returns mapped tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from spectral_dist.launch import botocore_text, corpus_cache, python_text, text_files
from spectral_dist.launch.text_files import DOCUMENT_CHARS, Text, digest

FORMAT = 2  # part of the cache key: raise it when the same input gives other tokens
END = "<|endoftext|>"
VALIDATION_PERMILLE = 20  # of the documents, for validation
SAMPLE_BYTES = 8 << 20  # of training text, for training the tokenizer
CODE = "code"
"""The name of the Python source that is installed, where a path would stand."""


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


def load(data: Sequence[str | Path], vocab_size: int, cache: Path | None = None) -> Corpus:
    """Return the tokens of a text, which are built at first use; see ``prepare``."""
    return read(prepare(data, vocab_size, cache), cache)


def prepare(data: Sequence[str | Path], vocab_size: int, cache: Path | None = None) -> str:
    """Build the tokens of a text in the cache, unless they are there, and return their key.

    Files are read and hashed each time, because their sizes and times would miss changes and differ
    between machines. That takes about 0.6 s of CPU time for a GB, once on each node. The hash of
    the default corpus is known, so that it is read when its tokens are not there.

    Args:
        data: files or folders of text, or the string "code", the Python source that is installed;
            none: the default corpus (``botocore_text``).
        vocab_size: of the tokenizer.
        cache: the folder of cached tokens; None: ``cache_folder()``.

    Raises:
        ValueError: no file, unreadable files or lines, too little text, a vocabulary below 257, no
            cache to write to, or for the default corpus no botocore of its release.
    """
    if vocab_size < 257:
        raise ValueError(f"a byte-level vocabulary needs 257 entries or more, not {vocab_size}")
    try:
        text = _text(data)
    except OSError as error:
        raise ValueError(f"cannot read the text: {error}") from None
    key = cache_key(text, vocab_size)

    def build(folder: Path) -> dict[str, Any]:
        return _build(text, vocab_size, folder)

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


def cache_key(text: Text, vocab_size: int) -> str:
    """Return a hash of everything that the tokens depend on, the text itself included."""
    content = json.dumps([FORMAT, vocab_size, text.identity])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _text(data: Sequence[str | Path]) -> Text:
    """Return the text that ``prepare`` is asked for."""
    if not data:
        return botocore_text.text()
    sources = []
    for item in data:
        sources += python_text.sources() if item == CODE else text_files.sources(Path(item))
    return text_files.text_of(sources)


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
    held_out = {name for name in names if digest("split", name) % 1000 < VALIDATION_PERMILLE}
    if not held_out or len(held_out) == len(set(names)):
        held_out = {min(names, key=lambda name: (digest("split", name), name))}
    return held_out


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


def _build(text: Text, vocab_size: int, folder: Path) -> dict[str, Any]:
    """Write the tokenizer and the tokens into a folder; return the content of its manifest."""
    names, sample = _sample_documents(text.documents())
    held_out = validation_names(names)
    training = [document for name, document in sample if name not in held_out]
    tokenizer = train_tokenizer(training, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {**_encode(text.documents(), tokenizer, held_out, folder), "vocab_size": vocab_size}


def _sample_documents(
    documents: Iterable[tuple[str, str]],
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of all documents, and the first SAMPLE_BYTES of them as (name, text)."""
    names, sample, size = [], [], 0
    for name, text in documents:
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
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, held_out: set[str], folder: Path
) -> dict[str, Any]:
    """Write train.bin and validation.bin, and return their dtype and counts."""
    # Text that happens to spell the end-of-text token stays text: only ``end`` is the token.
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(END)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    parts = {part: {"documents": 0, "bytes": 0, "tokens": 0} for part in ("train", "validation")}
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as held:
        files = {"train": train, "validation": held}
        for batch in _batches(documents):
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


def _batches(
    documents: Iterable[tuple[str, str]], size: int = 1 << 21
) -> Iterator[list[tuple[str, str]]]:
    """Iterate over lists of documents, about ``size`` characters each: enough for all threads."""
    batch, total = [], 0
    for name, text in documents:
        if text:
            batch.append((name, text))
            total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
