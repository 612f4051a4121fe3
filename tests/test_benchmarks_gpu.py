"""benchmarks.gpu at tiny sizes on a CPU: it cannot break unseen where no GPU is at hand."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu  # noqa: F401  the package itself
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench, host_cost, newton_schulz


def test_every_part_fills_its_rows_and_the_files_are_whole(tmp_path):
    output, png = tmp_path / "gpu.json", tmp_path / "gpu.png"
    tiny = ["--device", "cpu", "--tiny", "--json", str(output), "--png", str(png)]
    command.main(tiny)
    found = json.loads(output.read_text())
    assert found["torch"] == torch.__version__
    assert sorted(found["parts"]) == [part.letter for part in command.PARTS]
    for letter, part in found["parts"].items():
        assert part["error"] == "", (letter, part["traceback"])
        assert part["rows"], letter
        wrong = [row for row in part["rows"] if row.get("error", "not there") != "not there"]
        assert not wrong, (letter, wrong)
        assert not [note for note in part["notes"] if "left out" in note]
    steps = found["parts"]["c"]["rows"]
    assert {"AdamW fused", "torch.optim.Muon", "Muon", "SUMO r = 1/4"} <= {
        row["optimizer"] for row in steps
    }
    assert all(row["us per matrix"] > 0 and row["launches"] > 0 for row in steps)
    assert set(found["curves"]) == {"AdamW", "Muon", "SUMO", "POET"}
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not dist.is_initialized()


def test_needed_operations_are_those_of_the_halves_that_are_needed():
    """Five steps at 2 x 3: 3 numbers of X X^T, 3 of A^2, and 6 of the product with X."""
    grams, squares, products = 4 / 2 * 3, 4 / 2 * 2, 6 * 2
    assert newton_schulz.needed_flops(3, 2) == 5 * 2 * (grams + squares + products)


def test_an_error_ends_its_row_or_part_alone(monkeypatch, tmp_path):
    def rows(b: bench.Bench) -> None:
        for number in range(3):
            with b.attempt({"number": number}) as row:
                row["half"] = 1 / (number - 1)

    def hangs(b: bench.Bench) -> None:
        while True:
            pass

    def breaks(b: bench.Bench) -> None:
        b.add({"number": 7})
        raise RuntimeError("of the part | itself")

    parts = [bench.Part(*("a", "rows", 5, rows)), bench.Part("b", "breaks", 5, breaks)]
    parts.append(bench.Part("c", "hangs", -13, hangs))  # 20 s of patience, less
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "MINUTES", 1)
    output = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--minutes", "1", "--json", str(output)]
    command.main(options)
    found = json.loads(output.read_text())["parts"]
    assert [row.get("half") for row in found["a"]["rows"]] == [-1, None, 1]
    assert found["a"]["rows"][1]["error"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in found["a"]["rows"][1]["traceback"]
    assert found["b"]["rows"] == [{"number": 7}]
    assert found["b"]["error"] == "RuntimeError: of the part / itself"
    assert found["c"]["error"].startswith("TimeoutError")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--parts", "a,x", "--device", "cpu"], "no part x"),
        (["--minutes", "0", "--device", "cpu"], "must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        command.main(given)
    assert message in capsys.readouterr().err


def test_waits_are_counted_by_line():
    here = bench.Bench(torch.device("cpu"), tiny=True)
    with host_cost.waits(here) as places:
        torch.ones(3).sum().item()
    ((line, count),) = places.items()
    assert count == 1
    assert ".item()" in line
