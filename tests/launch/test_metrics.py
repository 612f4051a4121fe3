"""metrics.jsonl: what is there stays, whatever is killed when."""

import json
from pathlib import Path

import pytest

from spectral_dist.launch.report import Log, read_metrics


def lines(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out)]


def write(out: Path, *steps: int, end: str = "") -> None:
    out.mkdir(exist_ok=True)
    text = "".join(json.dumps({"part": "train", "step": s, "loss": 1.0}) + "\n" for s in steps)
    (out / "metrics.jsonl").write_text(text + end)


def test_what_is_repeated_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5)
    before = (tmp_path / "metrics.jsonl").open()  # as a killed process had it: not emptied
    log = Log(tmp_path, 3)
    assert lines(tmp_path) == [1, 2, 3]
    assert len(before.readlines()) == 5
    before.close()
    log.add("train", 4, {"loss": 0.5})
    assert lines(tmp_path) == [1, 2, 3, 4]  # at once, so that a kill leaves it
    log.matrices(4, {"nuclear_norm": {"a": 1.0}})
    assert lines(tmp_path) == [1, 2, 3, 4, 4]
    log.close()


def test_a_cut_last_line_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1, 2, end='{"part": "train", "st')
    assert lines(tmp_path) == [1, 2]
    assert "metrics.jsonl:3: the last line is cut" in capsys.readouterr().out
    Log(tmp_path, 2).close()
    assert "metrics.jsonl:3: no whole record, left out" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("wrong", ["{", "5", "[]", '{"part": "train"}', '{"part": 1, "step": "x"}'])
def test_lines_of_two_runs_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    """To resume, they are left out, since the checkpoint is whole; a table would be wrong."""
    write(tmp_path, 1, end=f'{wrong}\n{{"part": "train", "step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: this line is no record of a run"):
        read_metrics(tmp_path)
    Log(tmp_path, 2).close()
    assert "metrics.jsonl:2: no whole record" in capsys.readouterr().out
    assert lines(tmp_path) == [1, 2]


def test_a_missing_file_beside_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, 3)
    assert "metrics.jsonl is missing: it begins anew after step 3" in capsys.readouterr().out
    log.add("train", 4, {"loss": 0.5})
    log.close()
    assert lines(tmp_path) == [4]


def test_a_new_run_begins_with_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    Log(tmp_path, 0).close()
    assert lines(tmp_path) == []
