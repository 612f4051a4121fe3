"""The default corpus: botocore's documentation, the same text wherever it is installed."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from spectral_dist.launch import botocore_text, corpus

LONG = "A sentence of {0}, which is long enough to be a paragraph of the text."
Install = Callable[..., Path]


def description(*documentation: str) -> dict[str, Any]:
    """A service's description with strings at several depths."""
    shapes = [
        {"documentation": text, "members": [{"type": "string"}]} for text in documentation[1:]
    ]
    return {"documentation": documentation[0], "shapes": {str(i): s for i, s in enumerate(shapes)}}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a botocore of a few services in a folder of its own; returns botocore/data."""

    def installed(
        services: Mapping[str, Mapping[str, Any]], release: str = botocore_text.RELEASE
    ) -> Path:
        site = tmp_path / "site"
        info = site / f"botocore-{release}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: botocore\nVersion: {release}\n"
        )
        (site / "botocore/data").mkdir(parents=True)
        (site / "botocore/__init__.py").write_text("raise RuntimeError('imported')\n")
        (site / "botocore/data/endpoints.json").write_text('{"documentation": "of no service"}')
        for service, versions in services.items():
            for version, content in versions.items():
                folder = site / "botocore/data" / service / version
                folder.mkdir(parents=True)
                packed = gzip.compress(json.dumps(content).encode())
                (folder / "service-2.json.gz").write_bytes(packed)
                (folder / "paginators-1.json").write_text('{"documentation": "not read"}')
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return site / "botocore/data"

    return installed


def services(count: int = 60) -> dict[str, dict[str, Any]]:
    """Services with two paragraphs of their own, one that all have, and a label."""
    return {
        f"service{i}": {
            "2020-01-01": description(f"<p>{LONG.format(f'old {i}')}</p>"),
            "2021-01-01": description(
                f"<p>{LONG.format(i)}</p><p>{LONG.format(f'more of {i}')}</p>",
                f"<p>{LONG.format('all')}</p>",
                "<p>A label.</p>",
            ),
        }
        for i in range(count)
    }


def test_elements_that_are_blocks_part_paragraphs_and_others_do_not() -> None:
    html = (
        '<p>One <code>two</code>\n three&nbsp;&amp;  <a href="x">four</a>.</p>bare'
        "<ul> <li> <p>five</p> </li> <li>six<br/>seven</li></ul><note><p>eight &lt; 9</p></note>"
    )
    wanted = ["One two three & four.", "bare", "five", "six", "seven", "eight < 9"]
    assert botocore_text.plain_paragraphs(html) == wanted


def test_a_document_is_a_service_in_its_newest_version_and_no_paragraph_is_there_twice(
    install: Install,
) -> None:
    pairs = list(botocore_text.documents(install(services())))
    assert sorted(name for name, _ in pairs) == sorted(services())
    paragraphs = [paragraph for _, text in pairs for paragraph in text.rstrip("\n").split("\n\n")]
    own = [LONG.format(text) for i in range(60) for text in (str(i), f"more of {i}")]
    assert sorted(paragraphs) == sorted([*own, LONG.format("all")])
    texts = dict(pairs)
    assert texts["service7"].startswith(f"{LONG.format(7)}\n\n{LONG.format('more of 7')}")
    assert LONG.format("all") in pairs[0][1]  # of the first alone


def test_unpacked_files_are_the_same_text(install: Install) -> None:
    folder = install(services())
    packed = list(botocore_text.documents(folder))
    for path in folder.rglob("service-2.json.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert list(botocore_text.documents(folder)) == packed


@pytest.mark.slow
def test_the_default_corpus_is_split_by_service_and_needs_no_import(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(services())
    pairs = dict(botocore_text.documents(folder))
    monkeypatch.setattr(botocore_text, "SHA256", botocore_text.sha256(pairs.items()))
    loaded = corpus.load([], 300, tmp_path / "cache")
    held_out = corpus.validation_names(list(pairs))
    assert loaded.manifest["validation"] == {
        "documents": len(held_out),
        "bytes": sum(len(pairs[name].encode()) for name in held_out),
        "tokens": len(loaded.validation),
    }
    assert loaded.manifest["train"]["documents"] == 60 - len(held_out)
    # the text is known, so that tokens of it are taken wherever they are
    (folder / "service7/2021-01-01/service-2.json.gz").unlink()
    assert corpus.prepare([], 300, tmp_path / "cache") == loaded.key
    assert corpus.prepare(["code"], 300, tmp_path / "cache") != loaded.key


def test_another_text_is_refused(install: Install, tmp_path: Path) -> None:
    install(services())
    with pytest.raises(ValueError, match=r"has the SHA-256 \w+, and .*--force-reinstall") as caught:
        corpus.load([], 300, tmp_path / "cache")
    assert botocore_text.SHA256 in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_another_release_is_refused(install: Install, tmp_path: Path) -> None:
    install(services(), "1.43.12")
    message = (
        r"botocore 1\.43\.11, and 1\.43\.12 is installed: run pip install botocore==1\.43\.11,"
    )
    with pytest.raises(ValueError, match=message):
        corpus.load([], 300, tmp_path / "cache")


def test_no_botocore_says_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match=r"and none is installed: .* or give --data code"):
        corpus.load([], 300, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{")[:-4], gzip.compress(b"{")])
def test_a_damaged_file_is_named(install: Install, tmp_path: Path, content: bytes) -> None:
    path = install(services()) / "service7/2021-01-01/service-2.json.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the text of botocore in {path}"):
        corpus.load([], 300, tmp_path / "cache")


@pytest.mark.slow  # half a minute
def test_the_installed_release_has_the_text_that_is_meant() -> None:
    if find_spec("botocore") is None:
        pytest.skip("botocore is not installed")
    pairs = list(botocore_text.documents(botocore_text.data_folder()))
    assert botocore_text.sha256(pairs) == botocore_text.SHA256
    texts = dict(pairs)
    held_out = corpus.validation_names(list(texts))
    size = sum(len(text.encode()) for text in texts.values())
    part = sum(len(texts[name].encode()) for name in held_out)
    assert len(texts) == 423
    assert size == pytest.approx(23.8e6, rel=0.01)
    assert 0.02 < part / size < 0.05
    kept: dict[bool, set[str]] = {True: set(), False: set()}
    for name, text in pairs:
        kept[name in held_out] |= set(text.rstrip("\n").split("\n\n"))
    assert not kept[True] & kept[False]
