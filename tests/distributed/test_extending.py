"""docs/extending.md, as a third party would follow it: every block of code on the page is run.

The rule is a package of its own, installed into an empty folder; processes that find that folder on
their path import nothing of it, and name it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spectral_dist.rules import registry
from tests.distributed import contract_runs
from tests.distributed.contract_runs import MEGATRON, SMALL, Weights, distance
from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.torch import layouts
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models
from tests.support.quiet import quiet

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = {
    (language, label): code
    for language, label, code in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.S | re.M)
}
FILES = {("python", "steady.py"), ("toml", "pyproject.toml")}
BOUND = 1e-5
IN_TORCH, IN_MEGATRON = "package", "package megatron"
"""Pools: ranks that have the package on their path, of which one kind has Megatron on the CPU."""


def test_no_block_of_the_page_is_left_out() -> None:
    run = FILES | {
        ("python", "torch"), ("json", "deepspeed"), ("bash", "megatron"), ("python", "megatron"),
        ("bash", "launch"), ("python", "check_steady.py"), ("python", "shares.py"),
        ("python", "placement"),
    }  # fmt: skip
    assert set(BLOCKS) == run
    assert PAGE.count("\n```") == 2 * len(BLOCKS)
    assert len(BLOCKS["python", "steady.py"].splitlines()) <= 45


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package is installed in, without the network."""
    source = tmp_path_factory.mktemp("source")
    for language, label in FILES:
        (source / label).write_text(BLOCKS[language, label])
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def ranks(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ranks that are started now find the package; this process has looked before."""
    assert "steady" not in {entry.name for entry in registry.entries()}
    monkeypatch.syspath_prepend(str(installed))


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    for (_, name), pool in list(harness.POOLS.items()):
        if name in (IN_TORCH, IN_MEGATRON):
            pool.end()


def execute(label: str, more: str = "", **scope: Any) -> dict[str, Any]:
    """What the names in a block of Python then are; ``more``: arguments beside the lr."""
    block = BLOCKS["python", label].replace("lr=0.02)", f"lr=0.02{more})")
    code = compile(block, f"docs/extending.md, {label}", "exec")
    exec(code, scope)
    return scope


def under_torch(layout: str) -> Weights:
    placed = layouts.build(layout)
    with quiet():
        optimizer = execute("torch", model=placed.model)["optimizer"]
        assert type(optimizer).__name__ == "Steady"
        for step in range(contract_runs.STEPS):
            placed.backward(step)
            optimizer.step()
    return placed.full()


def fsdp() -> tuple[float, float]:
    sharded, alone = under_torch("fsdp"), under_torch("one")
    return distance(sharded, alone), distance(alone, layouts.one(layouts.conditioned()).full())


@pytest.mark.usefixtures("ranks")
def test_fsdp2() -> None:
    for error, moved in harness.run(2, fsdp, pool=IN_TORCH):
        assert error < BOUND
        assert moved > 100 * BOUND


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_deepspeed(stage: int, tmp_path: Path) -> None:
    named = json.loads(BLOCKS["json", "deepspeed"])
    assert named["type"] == "SpectralSteady"
    args = ("Steady", named["params"], stage, str(tmp_path))
    for result in harness.run(2, contract_runs.deepspeed, *args, pool=IN_TORCH):
        assert result["alone"] < BOUND
        assert result["resumed"] < BOUND
        assert result["moved"] > 100 * BOUND


def under_megatron(tp: int) -> tuple[Weights, Weights]:
    """Weights before and after, by the page's code."""
    megatron_cpu.install(MEGATRON)
    data = models.parallel(tp=tp)
    ddp = models.wrap(models.gpt(**SMALL))
    before = models.full_parameters(ddp)
    with quiet():
        # at Megatron's own eps, AdamW takes whole steps on gradients that are roundings
        optimizer = execute("megatron", ", adam_eps=1e-4", model=ddp)["optimizer"]
        (inner,) = runs.inner(optimizer)
        assert (type(inner).__name__, inner.options.decay) == ("SpectralSteady", 0.9)
        for step in range(contract_runs.STEPS):
            models.train_step(ddp, optimizer, models.batch(step, *data))
    return before, models.full_parameters(ddp)


def flags() -> tuple[Any, Any, str, float]:
    """What Megatron-LM's own parser and ours make of the page's flags, and what is built then."""
    import typing

    import typing_extensions

    typing.override = typing_extensions.override  # type: ignore[attr-defined]  # Python 3.12's
    megatron_cpu.install(MEGATRON)
    from megatron.training.arguments import parse_args

    from spectral_dist.integrations.megatron.arguments import forget, parsed

    before, sys.argv = sys.argv, ["pretrain_gpt.py", *shlex.split(BLOCKS["bash", "megatron"])]
    try:
        args = parse_args()
        _, _, optimizer = runs.build(MEGATRON, "spectral_steady", model=SMALL)
        (inner,) = runs.inner(optimizer)
        return args.optimizer, parsed(), type(inner).__name__, inner.options.decay
    finally:
        sys.argv = before
        forget()


@pytest.mark.usefixtures("ranks")
@pytest.mark.slow
def test_megatron() -> None:
    """TP 2; and the flags, by Megatron's own parser."""
    wanted = ("adam", ("spectral_steady", {"decay": 0.9}), "SpectralSteady", 0.9)
    assert harness.run(1, flags, pool=IN_MEGATRON) == [wanted]
    before, alone = harness.run(1, under_megatron, 1, pool=IN_MEGATRON)[0]
    assert distance(before, alone) > 100 * BOUND
    for _, cut in harness.run(2, under_megatron, 2, pool=IN_MEGATRON):
        assert distance(cut, alone) < BOUND


def environment(installed: Path) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (installed, ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_check_rule(installed: Path, tmp_path: Path) -> None:
    path = tmp_path / "check_steady.py"
    path.write_text(BLOCKS["python", "check_steady.py"])
    done = subprocess.run(
        [sys.executable, str(path)], env=environment(installed), cwd=tmp_path,
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_launch(installed: Path, tmp_path: Path) -> None:
    """The page's command, for one step on little text."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of some text, for want of a better one\n" * 3
                            for i in range(4000)))  # fmt: skip
    program, *arguments = shlex.split(BLOCKS["bash", "launch"])
    assert program == "python"
    arguments += ["--data", str(text), "--out", str(tmp_path / "run"), "--stop-at", "1"]
    arguments += ["--seq-len", "16", "--eval-batches", "1"]
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(installed), cwd=ROOT,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert saved
    assert list((tmp_path / "run").rglob("*"))


def shares() -> list[str]:
    """What is said of the page's placement, of one that errs, and of values that are not there."""
    from spectral_dist.testing import check_placement
    from tests.support.weights import Weights as Small

    model = Small(a=(8, 6), b=(4, 10))
    with quiet():
        scope = execute("shares.py")
        scope = execute("placement", **scope, model=model)
        optimizer, whole = scope["optimizer"], scope["whole"]
        local = [p.detach().clone() for p in model.parameters()]
        with optimizer.placement.gathered(list(model.parameters()), write=True) as gathered:
            equal = [torch.equal(g, whole[n].flatten()) for n, g in
                     zip(whole, gathered, strict=True)]  # fmt: skip
            for tensor in gathered:
                tensor.add_(1)
        assert equal == [True, True]
        for p, before in zip(model.parameters(), local, strict=True):
            assert torch.equal(p.detach(), before + 1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    said = []
    moved = {name: value + 1 for name, value in whole.items()}
    stepped = {}
    for name, p in model.named_parameters():
        parts = [torch.empty_like(p.data) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.data)
        stepped[name] = torch.cat(parts).view(whole[name].shape)
    for values in (stepped, whole, moved if dist.get_rank() else stepped):
        try:
            check_placement(optimizer, values)
            said.append("")
        except AssertionError as error:
            said.append(str(error))
    return said


@pytest.mark.usefixtures("ranks")
def test_the_placement() -> None:
    """``check_placement`` holds, and fails on every rank once one of them has other values."""
    for right, before, elsewhere in harness.run(2, shares, pool=IN_TORCH):
        assert right == ""
        assert "a.weight: what this rank stores is not" in before
        assert "a.weight: what this rank stores is not" in elsewhere
        assert "on rank 1 of 2" in elsewhere
