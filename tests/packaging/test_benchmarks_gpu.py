"""benchmarks.gpu at tiny sizes on a CPU: it cannot break unseen where no GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench, host_cost, newton_schulz
from tests.gpu import support

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
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
    assert set(found["curves"]) == {"AdamW", "Muon", "POET"}
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
    parts.append(bench.Part("c", "hangs", -9, hangs))  # 15 s of patience, less
    monkeypatch.setattr(command, "PARTS", parts)
    output = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--minutes", str(1 / 60), "--json", str(output)]
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


def test_the_script_says_with_its_status_what_failed_and_measures_all_the_same(tmp_path):
    """Without a GPU the tests are skipped, and then the benchmark has no device."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$2" in pytest) echo tests; exit $TESTS;;\n'
        'benchmarks.gpu) echo measured "$@"; exit $MEASURED;; esac\n'
    )
    python.chmod(0o755)
    for tests, measured, status in (("0", "0", 0), ("1", "0", 1), ("0", "2", 2), ("1", "2", 1)):
        out = tmp_path / f"results-{tests}-{measured}"
        done = subprocess.run(
            ["bash", str(ROOT / "launch/gpu.sh"), str(out), "--tiny"],
            env={**os.environ, "PYTHON": str(python), "TESTS": tests, "MEASURED": measured},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert (out / "tests.log").read_text() == "tests\n"
        assert (out / "gpu.log").read_text().rstrip().endswith("--tiny")


@pytest.mark.slow
def test_without_a_gpu_its_tests_are_skipped_and_say_why():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("SPECTRAL_DIST_GPU_TESTS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "--confcutdir", "tests/gpu", "-rs"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" in done.stdout
    assert "passed" not in done.stdout
    assert "torch.cuda.is_available() is False: these tests need a CUDA device" in done.stdout


def test_a_package_that_is_missing_skips_its_tests():
    support.need("torch")
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed"):
        support.need("no_such_package")


def test_after_a_device_has_failed_a_new_process_goes_on(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(bench.Bench, "works", lambda self: False)
    monkeypatch.setattr(command.os, "execv", lambda path, given: commands.append(given))
    parts = [bench.Part(letter, "x", 5, lambda b: b.add({"n": 1})) for letter in "abc"]
    monkeypatch.setattr(command, "PARTS", parts)
    output = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--tiny", "--json", str(output), "--minutes", "2"]
    command.main([*given, "--parts", "b,a,c"])
    first = commands[0]
    assert first[1:4] == ["-m", "benchmarks.gpu", "--go-on"]
    assert first[first.index("--parts") + 1] == "b,c"
    assert first[first.index("--json") + 1] == str(output)
    command.main([*given, "--go-on", "--parts", "c"])
    found = json.loads(output.read_text())["parts"]
    assert list(found) == ["a", "b", "c"]
    assert all(part["rows"] == [{"n": 1}] for part in found.values())
