"""Memory of a rank: state is what the formula says, and a step's temporaries do not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import harness
from tests.support.memory import scaling
from tests.support.memory.formula import FLOAT
from tests.support.memory.scaling import BUCKET, LAYERS, LAYOUTS, OPTIMIZERS, MemoryCase

ROOT = Path(__file__).resolve().parents[2]
Found = list[dict[str, Any]]
"""of each rank"""


def check(case: MemoryCase, ranks: Found) -> None:
    """The formulas hold, of buckets that are as small as they are to be."""
    assert scaling.problems(case, ranks) == []
    if (case.layout, case.optimizer) == (
        "fsdp",
        "poet",
    ):  # every tensor is cut, so that no rank has much more than another
        kept = [sum(found["state"].values()) for found in ranks]
        assert max(kept) <= 1.1 * sum(kept) / len(kept)
    for found in ranks:
        assert found["state"]["matrix"] > 0
        if case.optimizer in ("adamw", "poet"):  # which exchange nothing
            continue
        assert found["peak"] >= found["bound"] / 2  # the bound is no idle one
        copies = len(ranks) if case.layout in ("ddp", "zero0") else 1
        assert found["buckets"]["takes"] <= BUCKET
        # each rank is the owner of a matrix of the bucket at least, and has a part of all of them
        assert found["buckets"]["returns"] <= 1.2 * copies * BUCKET


def check_growth(small: Found, large: Found) -> None:
    """Temporaries stay as they are where matrices grow three times.

    But for rows that do not divide over the ranks: which matrices share a bucket is not the same,
    and in each of three buckets a rank may have a part of a row more.
    """
    assert large[0]["numbers"]["matrix"] > 3 * small[0]["numbers"]["matrix"]
    grown = max(r["peak"] for r in large) - max(r["peak"] for r in small)
    assert grown <= 3 * scaling.FF * FLOAT


def run(world: int, case: MemoryCase) -> Found:
    return harness.run(world, scaling.measure, case)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.fast_cases("muon", "poet", "root")
def test_one_rank_alone(optimizer):
    case = MemoryCase("fsdp", optimizer)
    ranks = run(1, case)
    check(case, ranks)
    numbers = ranks[0]["numbers"]["matrix"]
    least = {"adamw": 2 * numbers, "poet": 2 * numbers, "sumo": 0}.get(optimizer, numbers)
    tensors = (14 if optimizer == "poet" else 7) * LAYERS["small"]
    most = numbers / 2 if optimizer == "sumo" else least + tensors
    assert FLOAT * least <= ranks[0]["state"]["matrix"] <= FLOAT * most


@pytest.mark.parametrize("case", [
    MemoryCase("zero1", "adamw"),
    *(MemoryCase(layout, "muon") for layout in ("zero0", "zero2", "zero3")),
    *(MemoryCase(layout, "sumo") for layout in ("ddp", "zero1")),
    *(MemoryCase(layout, "poet") for layout in ("ddp", "fsdp")),
], ids=lambda case: f"{case.layout}-{case.optimizer}")  # fmt: skip
@pytest.mark.fast_cases("ddp-sumo", "zero3-muon")
def test_two_ranks(case):
    check(case, run(2, case))


@pytest.mark.parametrize("case", [
    pytest.param(MemoryCase("ddp", "muon"), marks=pytest.mark.slow),
    pytest.param(MemoryCase("fsdp", "muon"), marks=pytest.mark.slow),
    pytest.param(MemoryCase("fsdp", "sumo", refresh=True), marks=pytest.mark.slow),
], ids=lambda case: f"{case.layout}-{case.optimizer}")  # fmt: skip
def test_temporaries_do_not_grow_with_the_model(case):
    small, large = (run(2, replace(case, size=size)) for size in LAYERS)
    check(case, small)
    check(replace(case, size="large"), large)
    check_growth(small, large)


@pytest.mark.slow
def test_it_is_the_bucket_that_bounds_them():
    """In a bucket that holds every model they do grow: the other tests can fail."""
    case = MemoryCase("fsdp", "muon", bucket=2**24)
    small, large = (run(1, replace(case, size=size))[0] for size in LAYERS)
    assert large["peak"] > 2.5 * small["peak"] > 2.5 * run(1, MemoryCase("fsdp", "muon"))[0]["peak"]


def torchrun(world: int, out: Path, *arguments: str) -> dict[MemoryCase, Found]:
    """What the script writes: ranks by case."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(world), "-m", scaling.__name__, "--out", str(out)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=2400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {MemoryCase(**found["case"]): found["ranks"] for found in json.loads(out.read_text())}


@pytest.mark.slow
def test_the_script_measures_the_same(tmp_path):
    found = torchrun(2, tmp_path / "found.json", "--layout", "fsdp", "--optimizer", "adamw,muon")
    assert found == {
        case: run(2, case) for case in (MemoryCase("fsdp", "adamw"), MemoryCase("fsdp", "muon"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_layout_and_optimizer(world, tmp_path):
    everything = ["--layout", ",".join(LAYOUTS), "--optimizer", ",".join(OPTIMIZERS)]
    small = torchrun(world, tmp_path / "small.json", *everything)
    for case, ranks in small.items():
        assert len(ranks) == world
        check(case, ranks)
    some = ["--layout", "ddp,fsdp,zero1,zero3", "--optimizer", "muon,sumo", "--size", "large"]
    for case, ranks in torchrun(world, tmp_path / "large.json", *some).items():
        check(case, ranks)
        check_growth(small[replace(case, size="small")], ranks)
