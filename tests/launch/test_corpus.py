"""The corpus: what is found, how it is split, what its numbers mean."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from spectral_dist.launch import corpus, python_text, text_files


def _texts(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        words = " ".join(f"word{(i * 7 + k) % 31} ünï {i} {k}" for k in range(60))
        (folder / f"{i:02}.txt").write_text(words + "\n", encoding="utf-8")
    return folder


def _decode(tokens: np.ndarray, loaded: corpus.Corpus) -> list[str]:
    """The documents of a part, in order."""
    end = loaded.tokenizer.token_to_id(corpus.END)
    assert tokens[-1] == end
    stops = np.flatnonzero(tokens == end)
    starts = [0, *(stops[:-1] + 1)]
    pairs = zip(starts, stops, strict=True)
    return [loaded.tokenizer.decode(tokens[a:b].tolist()) for a, b in pairs]


def test_parts_are_disjoint_whole_and_deterministic(tmp_path: Path) -> None:
    data = _texts(tmp_path / "data")
    first = corpus.load([data], 400, tmp_path / "a")
    again = corpus.load([data], 400, tmp_path / "b")
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.validation, again.validation)
    train, held_out = _decode(first.train, first), _decode(first.validation, first)
    files = [path.read_text(encoding="utf-8") for path in sorted(data.iterdir())]
    assert held_out
    assert sorted(train + held_out) == sorted(files)
    assert not set(train) & set(held_out)


def test_the_split_of_a_document_depends_on_its_name_alone() -> None:
    names = [f"a/{i}.py" for i in range(5000)]
    chosen = corpus.validation_names(names)
    assert corpus.validation_names(names[::-1]) == chosen
    half = corpus.validation_names(names[:2500])
    assert half == chosen & set(names[:2500])
    assert len(chosen) / 5000 == pytest.approx(0.02, abs=0.006)


def test_byte_counts_are_those_of_the_text(tmp_path: Path) -> None:
    data = _texts(tmp_path / "data")
    loaded = corpus.load([data], 400, tmp_path / "cache")
    size = sum(path.stat().st_size for path in data.iterdir())
    parts = [loaded.manifest[part] for part in ("train", "validation")]
    assert sum(part["bytes"] for part in parts) == size
    for part, tokens in zip(parts, (loaded.train, loaded.validation), strict=True):
        assert loaded.token_bytes[tokens].sum() == part["bytes"]
        assert len(tokens) == part["tokens"]


def test_bits_per_byte_by_hand() -> None:
    # 3 tokens of ln 16 nats are 4 bits each: 12 bits on 6 bytes.
    assert corpus.bits_per_byte(math.log(16), 3, 6) == pytest.approx(2.0, rel=1e-15)


def test_special_token_in_the_text_is_text(tmp_path: Path) -> None:
    data = _texts(tmp_path / "data")
    (data / "00.txt").write_text(f"before {corpus.END} after", encoding="utf-8")
    loaded = corpus.load([data], 400, tmp_path / "cache")
    end = loaded.tokenizer.token_to_id(corpus.END)
    both = np.concatenate([loaded.train, loaded.validation])
    assert (both == end).sum() == 40


def test_changed_data_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    data = _texts(tmp_path / "data")
    old = corpus.load([data], 400, tmp_path / "cache")
    (data / "00.txt").write_text("something else altogether", encoding="utf-8")
    assert corpus.load([data], 400, tmp_path / "cache").key != old.key


def _load(data: Path, cache: Path) -> list[int]:
    return corpus.load([data], 400, cache).train.tolist()


def test_two_processes_that_start_at_once_get_the_same(tmp_path: Path) -> None:
    data = _texts(tmp_path / "data")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_load, data, tmp_path / "cache") for _ in range(2)]
        first, second = (job.result(timeout=60) for job in jobs)
    assert first == second
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing half-built stays behind


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = [f"line {i}" for i in range(20)]
    file.write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in texts), encoding="utf-8")
    loaded = corpus.load([file], 300, tmp_path / "cache")
    found = _decode(loaded.train, loaded) + _decode(loaded.validation, loaded)
    assert sorted(found) == sorted(texts)


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    lines = [f"line {i} {'x' * 90}\r\n" for i in range(2000)]
    file.write_bytes("".join(lines).encode())
    pieces = [text for _, text in text_files.documents(text_files.sources(file)[0])]
    assert len(pieces) == 4
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r'a\.jsonl:2: expected an object with a string under "text"'),
        ('{"text": 3}', r'a\.jsonl:2: expected an object with a string under "text"'),
        ("[1]", r"a\.jsonl:2: expected an object"),
        ("{", r"a\.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        corpus.load([file], 300, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        corpus.load([tmp_path / "absent"], 300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt or \.jsonl file below"):
        corpus.load([tmp_path / "empty"], 300)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"expected a \.txt or \.jsonl file"):
        corpus.load([tmp_path / "a.csv"], 300)
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match=r"too little text: 1 document"):
        corpus.load([tmp_path / "one.txt"], 300, tmp_path / "cache")
    with pytest.raises(ValueError, match="257"):
        corpus.load([tmp_path / "one.txt"], 256)


def test_python_source_is_a_bounded_sample_of_both_trees() -> None:
    sources = python_text.sources()  # lists, reads nothing
    assert sum(source.size for source in sources) <= python_text.PYTHON_BYTES
    assert {source.name.split("/")[0] for source in sources} == {"python", "torch"}
    assert [s.name for s in python_text.sources()] == [s.name for s in sources]
    skipped = ("site-packages", "encodings")
    assert not any(name in source.name.split("/") for source in sources for name in skipped)


def test_code_is_python_source_and_a_folder_of_that_name_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"value_{i} = {i}\n" for i in range(50)]
    for i, line in enumerate(lines):
        (tmp_path / f"{i:02}.py").write_text(line)
    found = [text_files.Source(p.name, p, p.stat().st_size) for p in sorted(tmp_path.glob("*.py"))]
    monkeypatch.setattr(python_text, "sources", lambda: found)
    monkeypatch.chdir(tmp_path)
    _texts(tmp_path / "code")
    python = corpus.load(["code"], 300, tmp_path / "cache")
    assert sorted(_decode(python.train, python) + _decode(python.validation, python)) == sorted(
        lines
    )
    folder = corpus.load(["./code"], 300, tmp_path / "cache")
    assert folder.key == corpus.prepare([Path("code")], 300, tmp_path / "cache") != python.key
    both = corpus.load(["code", "./code"], 300, tmp_path / "cache")
    parts = [both.manifest[part]["documents"] for part in ("train", "validation")]
    assert sum(parts) == 50 + 40
