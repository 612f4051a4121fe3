"""benchmarks.peers at tiny sizes, with what is installed: its counts are what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import job, models, start, tables
from tests.support import harness

NAMES = ["AdamW", "ours", "ours, float32 wire", "torch.optim.Muon"]


def rank_rows(folder: Path, layout: str, model: str) -> list[dict[str, Any]]:
    return job.run_case(job.Job(0, [], str(folder), tiny=True, names=NAMES), layout, model)


def rows(folder: Path, layout: str, model: str) -> dict[str, dict[str, Any]]:
    """Return the rows of two ranks, after one process has left its own as a reference."""
    harness.run(1, rank_rows, folder, layout, model)
    found = harness.run(2, rank_rows, folder, layout, model)
    gathered = [start.gathered(parts, 2) for parts in zip(*found, strict=True)]
    return {row["name"]: {**row, "link": "one host"} for row in gathered}


def test_bytes_calls_and_matrices_are_those_of_the_formulas(tmp_path):
    found = rows(tmp_path, "fsdp", "gqa")
    assert list(found) == NAMES
    assert not any(row["failed"] for row in found.values())
    model = models.build(models.form("gqa", 1, tiny=True))
    matrices = [dict(model.named_parameters())[name] for name in models.matrix_names(model)]
    numbers, flag = sum(m.numel() for m in matrices), 12
    extra = {n: tables.over_adamw(row, list(found.values())) for n, row in found.items()}
    assert extra["ours"] == numbers * 2 / 2 + flag  # 2 w N / P numbers of 2 bytes
    assert extra["ours, float32 wire"] == numbers * 4 / 2 + flag
    assert extra["torch.optim.Muon"] > 2 * extra["ours, float32 wire"]
    assert sum(found["ours"]["polar"]) == len(matrices)
    assert found["torch.optim.Muon"]["polar"] == [len(matrices)] * 2
    assert all(row["error"] < tables.EXACT for row in found.values())
    assert all(peak > 0 for row in found.values() for peak in row["peak"])


def test_what_refuses_is_named_and_what_loses_is_said(tmp_path):
    found = rows(tmp_path, "fsdp", "stacked")
    assert "only supports 2D" in found["torch.optim.Muon"]["failed"]
    assert found["ours"]["failed"] == ""
    text = tables.document(list(found.values()))
    assert "| torch.optim.Muon | ValueError" in text
    assert "no exact peer" in text
    cheaper = {**found["ours"], "name": "a peer", "mean sent": 1.0}
    assert "a peer sends 1 B" in tables.document([*found.values(), cheaper])


def test_a_folder_of_packages_and_of_checkouts(tmp_path):
    (tmp_path / "dion/dion").mkdir(parents=True)
    (tmp_path / "dion/dion/__init__.py").touch()
    (tmp_path / "heavyball").mkdir()
    (tmp_path / "heavyball/__init__.py").touch()
    assert command.paths(tmp_path) == [str(tmp_path / "dion"), str(tmp_path)]


@pytest.mark.slow
def test_the_command_writes_what_it_has_measured(tmp_path):
    """With DeepSpeed, whose built-in orthogonalizes where gradients are reduced."""
    output = tmp_path / "peers.json"
    command.main(cases="ddp/gqa,zero1/gqa,zero3/gqa", ranks="2", rate="", seconds=0.01, tiny=True,
                 json_path=output, markdown=tmp_path / "peers.md")  # fmt: skip
    written = json.loads(output.read_text())["rows"]
    two = [row for row in written if row["ranks"] == 2]
    failed = {row["failed"] for row in two if row["failed"]}
    assert all(reason.startswith("no package") for reason in failed), failed
    third = {r["name"]: r for r in two if r["layout"] == "zero3"}
    built_in = third["DeepSpeed's Muon, no reduce_scatter"]
    assert built_in["mean sent"] > third["ours, no reduce_scatter"]["mean sent"]
    assert sum(built_in["polar"]) == sum(third["ours"]["polar"]) == 6
    assert all(len(row["times"]) >= 3 for row in two if not row["failed"])
    assert "#### zero3, gqa, 2 ranks, one host" in (tmp_path / "peers.md").read_text()
