"""`spectral-dist plan`, and what docs/plan.md shows of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spectral_dist.launch import machines
from spectral_dist.launch.cli import app
from spectral_dist.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs/models"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "80"})


def as_json(model: str, *words: str) -> dict[str, Any]:
    result = run("--model", str(MODELS / f"{model}.json"), "--json", *words)
    assert result.exit_code == 0, result.output
    numbers: dict[str, Any] = json.loads(result.stdout)
    return numbers


def test_the_page_shows_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    command, shown = (
        match.strip()
        for match in re.search(r"```bash\n(.*?)```\n\n```text\n(.*?)```", page, re.S).groups()  # type: ignore[union-attr]
    )
    printed = run(*shlex.split(command)[2:]).stdout
    assert "\n".join(line.rstrip() for line in printed.strip().splitlines()) == shown


def test_optimizers_and_strategies_are_compared_each_with_its_own_options() -> None:
    words = ("--engine", "fsdp", "--nodes", "2", "--gpus-per-node", "2", "--option", "rank=4")
    pairs = ("--optimizer", "muon", "--optimizer", "sumo", "--strategy", "owner", "--strategy")
    result = as_json("tiny", *words, *pairs, "split", "--each", "--tokens", "1024")
    lines = {(line["optimizer"], line["strategy"]): line for line in result["compared"]}
    assert set(lines) == {(o, s) for o in ("muon", "sumo") for s in ("owner", "split")}
    assert "strategy is 'split'" in lines["sumo", "split"]["refused"]
    for name in ("muon", "sumo"):
        line = lines[name, "owner"]
        assert line["share"] == line["seconds"] / (line["seconds"] + result["training_seconds"])
        names = [matrix["name"] for matrix in line["matrices"]]
        assert len(names) == len(set(names)) == 14
        assert all(matrix["owner"] in range(4) and matrix["reason"] for matrix in line["matrices"])
    # r numbers of a row in place of all: SUMO keeps less
    estimates = {name: lines[name, "owner"]["estimate"] for name in ("muon", "sumo")}
    kept = {name: e["optimizer_state"]["mean"] for name, e in estimates.items()}
    assert kept["sumo"] < kept["muon"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    target = tmp_path / "load.png"
    as_json("tiny", "--engine", "ddp", "--dp", "3", "--picture", str(target))
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", machines.names())
def test_shipped_machines_are_whole(name: str) -> None:
    values = json.loads((machines.MACHINES / f"{name}.json").read_text(encoding="utf-8"))
    assert set(values) == {"about", *vars(Machine())}
    assert machines.load(name) == Machine(**{k: v for k, v in values.items() if k != "about"})


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--machine", "h100-nvlink"), "did you mean 'h100-nvlink-ib'"),
        (("--machine", "none.json"), "no JSON that can be read. Known: a100"),
        (("--machine", "LIST"), "write an object of numbers by name"),
        (("--machine", "TEXT"), "in machine "),
        (("--machine", "WRONG"), "unknown number 'flop'"),
        (("--optimizer", "poet"), "there is nothing to plan"),
        (
            ("--optimizer", "sumo", "--option", "rank=4", "--strategy", "split"),
            "strategy is 'split'",
        ),
        (("--option", "momentums=0.9"), "unknown option 'momentums'"),
        (("--option", "strategy=gram"), "write --strategy"),
        (("--option", "machine={}"), "write --machine"),
        (("--strategy", "block"), "take turns"),
        (("--engine", "zero5"), "unknown engine"),
    ],
)
def test_errors_say_what_to_write(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    contents = {"LIST": "[1]", "TEXT": "{", "WRONG": '{"flop": 1.0}'}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    chosen = [str(tmp_path / f"{word}.json") if word in contents else word for word in words]
    engine = () if "--engine" in words else ("--engine", "fsdp")
    result = run("--model", str(MODELS / "tiny.json"), *engine, "--dp", "4", *chosen)
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.stderr.split())
    assert "docs/troubleshooting.md#" in result.stderr
