"""A run goes on in another framework with the numbers it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectral_dist import checkpoint
from spectral_dist.checkpoint import convert
from spectral_dist.checkpoint.run import Run
from spectral_dist.launch.cli import app
from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.universal import SCHEDULER, to_universal
from tests.distributed.torch import layouts
from tests.distributed.torch.checkpoint_legs import leg
from tests.distributed.torch.checkpoint_legs import same as same_states
from tests.support import harness, models
from tests.unit.checkpoint.converting import (
    changed,
    loaded,
    muon,
    refused,
    saved,
    steps,
    torch_file,
)


def read(kind: str, path: Path) -> Run:
    return convert.FORMATS[kind][0](path).check(path)


def same(a: Run, b: Run, exact: bool = True) -> None:
    """Equal weights and states; counts of steps apart where a parameter has no moments."""
    same_states({"": b.model}, {"": a.model})
    assert a.state.keys() == b.state.keys()
    for name, state in a.state.items():
        assert b.state[name].keys() == state.keys(), name
        for key, value in state.items():
            assert b.state[name][key].dtype == value.dtype, (name, key)
            if key == "exp_avg" and not exact:
                torch.testing.assert_close(b.state[name][key], value, rtol=2e-7, atol=0)
            elif key != "step" or a.has_moments(name):
                assert torch.equal(b.state[name][key], value), (name, key)
    assert [group["names"] for group in a.groups] == [group["names"] for group in b.groups]


# -- round trips


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), ("ddp", 2)])
def test_a_checkpoint_of_many_ranks_is_read_whole(layout: str, world: int, tmp_path: Path) -> None:
    harness.run(world, leg, layout, "muon", 0, 2, save=str(tmp_path / "a"))
    run = convert.convert("dcp", tmp_path / "a", "dcp", tmp_path / "b")
    alone = leg("one", "muon", 0, 0, load=str(tmp_path / "a"))
    for found in (alone, leg("one", "muon", 0, 0, load=str(tmp_path / "b"))):
        same_states({"": run.model, **run.state}, {"": found["parameters"], **found["states"]})


@pytest.mark.parametrize("kind", ["dcp", "universal", "torch", "dion"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    odd = kind in ("dcp", "universal")  # torch's Muon has no stacks
    saved(tmp_path / "a", odd=odd, epoch=2, lr_scheduler={"gamma": 0.5})
    before = read("dcp", tmp_path / "a")
    if kind == "dion":
        before.groups[0]["scale"] = "spectral"
    convert.FORMATS[kind][1](tmp_path / "b", before)
    convert.convert(kind, tmp_path / "b", "dcp", tmp_path / "c")
    after = read("dcp", tmp_path / "c")
    same(before, after, exact=kind != "dion")
    assert after.extra["epoch"] == 2
    assert after.extra["lr_scheduler"]["gamma"] == 0.5
    for old, new in zip(before.groups, after.groups, strict=True):
        shared = (old.keys() & new.keys()) - {"polar_steps"}
        rates = [group["lr"] * group["lr_ratio"] for group in (old, new)]
        assert rates[1] == pytest.approx(rates[0])  # DeepSpeed has one lr in all groups
        for key in shared - {"names", "lr", "lr_ratio"}:
            assert new[key] == (old[key] if isinstance(old[key], str) else pytest.approx(old[key]))
        assert shared >= {"kind", "lr", "lr_ratio", "weight_decay", "names"}
    assert after.groups[0].keys() >= {"scale", "nesterov", "momentum"}
    assert after.groups[1].keys() >= {"betas", "eps"}


@pytest.mark.parametrize("kind", ["dcp", "universal"])
def test_a_converted_run_goes_on(kind: str, tmp_path: Path) -> None:
    """To the bit, by the options of the checkpoint."""
    model, optimizer = saved(tmp_path / "a")
    convert.convert("dcp", tmp_path / "a", kind, tmp_path / "b")
    convert.convert(kind, tmp_path / "b", "dcp", tmp_path / "c")
    other, resumed = loaded(tmp_path / "c")
    assert steps(model, [optimizer], 3, 6) == steps(other, [resumed], 3, 6)


# -- DeepSpeed


def resume_fsdp(folder: str, first: int, last: int) -> list[float]:
    """FSDP2 on all ranks, each with the whole batch, as one process has."""
    placed = layouts.fsdp(models.build(seed=1))
    optimizer = muon(placed.model)
    checkpoint.load(folder, placed.model, optimizer)
    return steps(placed.model, [optimizer], first, last)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.fast_cases("1")
def test_deepspeed_goes_on_in_torch(stage: int, tmp_path: Path) -> None:
    config = engine.config(stage, 2, zero={"sub_group_size": 3000})
    harness.run(2, engine.interrupted, config, str(tmp_path), first=0, last=3, save="a")
    tag = to_universal(tmp_path, "a")
    run = convert.convert("universal", tmp_path / tag, "dcp", tmp_path / "b")
    assert run.extra["global_steps"] == 3
    never = models.build()
    wanted = steps(never, [muon(never)], 0, 7)[3:]
    model, optimizer = loaded(tmp_path / "b")
    assert torch.equal(model.frozen.weight, never.frozen.weight)
    assert steps(model, [optimizer], 3, 7) == pytest.approx(wanted, abs=1e-5)
    for losses in harness.run(2, resume_fsdp, str(tmp_path / "b"), 3, 7):
        assert losses == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.fast_cases("2")
def test_one_process_goes_on_under_deepspeed(stage: int, tmp_path: Path) -> None:
    """At any stage of the same files, with the schedule of the JSON where it would be."""
    model, optimizer = saved(tmp_path / "a")
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    wanted = steps(model, [optimizer], 3, 6)
    universal = {"checkpoint": {"load_universal": True}}
    config = engine.config(stage, 2, zero={"sub_group_size": 3000}, **universal)
    # the same seed: DeepSpeed loads no frozen weight from a universal checkpoint
    results = harness.run(2, engine.interrupted, config, str(tmp_path), first=3, last=6, load="b")
    means = [sum(x) / 2 for x in zip(*(r["losses"] for r in results), strict=True)]
    assert means == pytest.approx(wanted, abs=1e-5)
    assert set(results[0]["adam_steps"]) == {6.0}
    for group, lr in zip(results[0]["groups"], (0.02, 0.005), strict=True):
        assert group["lr"] * group["lr_ratio"] == pytest.approx(lr)
    config |= SCHEDULER
    found = harness.run(2, engine.interrupted, config, str(tmp_path), first=3, last=6, load="b")[0]
    del config["checkpoint"]
    never = harness.run(2, engine.interrupted, config, str(tmp_path), first=0, last=6)[0]
    assert found["lrs"][1:] == pytest.approx(never["lrs"][4:])


# -- what is refused


def test_bad_names_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", count=1)
    a, b = tmp_path / "a", tmp_path / "b"
    refused("'megatron' is no format; known: dcp", "dcp", a, "megatron", b)
    refused("there is no", "dcp", tmp_path / "nowhere", "torch", b)
    refused("no .metadata", "dcp", tmp_path, "torch", b)
    refused("no universal checkpoint", "universal", a, "torch", b)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("no 'muon'", lambda c: c.pop("muon")),
        ("unknown key 'sgd'", lambda c: c.update(sgd={})),
        ("named parameters", lambda c: c["muon"]["param_groups"][0].pop("param_names")),
        ("amsgrad is True", lambda c: c["adamw"]["param_groups"][0].update(amsgrad=True)),
        ("unknown option 'speed'", lambda c: c["muon"]["param_groups"][0].update(speed=1)),
        ("embed.weight .* not in the model", lambda c: c["model"].pop("embed.weight")),
        (r"unknown state '\(rows\)' of", lambda c: c["muon"]["state"][0].update(rows=1)),
        ("no exp_avg_sq of embed.weight", lambda c: c["adamw"]["state"][0].pop("exp_avg_sq")),
        ("but its exp_avg is", lambda c: c["muon"]["state"].update({0: c["muon"]["state"][1]})),
    ],
)  # fmt: skip
def test_a_torch_file_that_is_not_whole(message: str, change: Any, tmp_path: Path) -> None:
    torch_file(tmp_path / "a.pt", count=1)
    refused(message, "torch", changed(tmp_path / "a.pt", change), "dcp", tmp_path / "b")


def test_what_another_format_has_no_place_for(tmp_path: Path) -> None:
    saved(tmp_path / "odd", count=1)
    refused("experts is", "dcp", tmp_path / "odd", "torch", tmp_path / "b")
    saved(tmp_path / "a", odd=False)
    run = read("dcp", tmp_path / "a")
    for options, message in (
        ({"scale": "none"}, "no scale 'none'"),
        ({"polar": "svd"}, "no polar 'svd'"),
        ({"quantile": 0.9}, "another rule's"),
    ):
        groups = [{**run.groups[0], **options}, run.groups[1]]
        with pytest.raises(ValueError, match=message):
            convert.FORMATS["torch"][1](tmp_path / "b", Run(run.model, run.state, groups))
    run.state["head.weight"]["step"] -= 1
    for kind in ("universal", "dion"):
        with pytest.raises(ValueError, match=r"2 on head.weight and 3 on|3 on .* 2 on head.weight"):
            convert.FORMATS[kind][1](tmp_path / "b", run)
    with pytest.raises(ValueError, match="set is no plain data"):
        Run(extra={"set": Path("x")}).check("here")


def test_a_universal_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    saved(tmp_path / "a", count=1)
    convert.convert("dcp", tmp_path / "a", "universal", tmp_path / "b")
    args = ("universal", tmp_path / "b", "dcp", tmp_path / "c")
    folder = tmp_path / "b" / "zero" / "embed.weight"
    (folder / "exp_avg.pt").rename(folder / "other.pt")
    refused("(no exp_avg|unknown state 'other') of embed", *args)
    (folder / "other.pt").unlink()
    refused("no exp_avg of embed", *args)
    (folder.parent / "what.weight").mkdir()
    refused("what.weight is of a parameter", *args)


def test_command(tmp_path: Path) -> None:
    saved(tmp_path / "a", count=1)
    words = ["convert", "dcp", str(tmp_path / "a"), "universal", str(tmp_path / "b")]
    done, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert "10 parameters of matrices and 10 of AdamW" in done.output
    assert (done.exit_code, again.exit_code) == (0, 1)
    assert "already; give another name" in again.stderr
