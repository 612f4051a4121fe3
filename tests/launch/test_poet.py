"""POET by launch/pretrain.py: its YAML, its short name, and the engines of plain torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import spectral_dist
from spectral_dist import poet
from spectral_dist.launch import llama, torch_config
from spectral_dist.launch.pretrain import app
from tests.launch.jobs import MODEL, ROOT, STEPS, LaunchedJob
from tests.launch.torch_runs import losses, rows_of, write
from tests.support import harness
from tests.support.quiet import quiet

POET: dict[str, Any] = {
    "type": "POET", "block": 8, "init": "normalized", "lr": 0.01, "eps": 1e-5, "merge_every": 4,
    "clip_ramp": 2, "scalar_lr": 0.01, "scalars": ["layers.0.self_attn.o_proj"],
}  # fmt: skip
ROTATED = {"layers": 2 * 7 - 1, "numbers": 2 * (4 * 32 * 32 + 3 * 32 * 48) - 32 * 32}
SKEW = {"sides": 2 * (8 * 32 + 3 * (32 + 48)) - 2 * 32}
PARAMETERS = 2 * 320 * 32 + ROTATED["numbers"] + 32 * 32 + 5 * 32
TRAINED = PARAMETERS - ROTATED["numbers"] + SKEW["sides"] * 7 // 2
LAYOUTS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "fsdp on 2": (2, True, {}),
    "ddp on 2": (2, False, {}),
    "fsdp on 4": (4, True, {"micro_batch": 1}),
    "hsdp on 4": (4, True, {"mesh": {"replicate": 2, "shard": -1}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("poet")


@functools.cache
def alone(folder: Path) -> tuple[list[float], dict[str, Any]]:
    found: tuple[list[float], dict[str, Any]]
    found = harness.run(1, losses, write(folder, POET, "alone", clip=0.5), False)[0]
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (i > 0)) for i, n in enumerate(LAYOUTS)]
)
def test_however_many_ranks_share_it(folder: Path, layout: str) -> None:
    world, sharded, keys = LAYOUTS[layout]
    path = write(folder, POET, clip=0.5, **keys)
    wanted, one = alone(folder)
    found = harness.run(world, losses, path, sharded)
    assert wanted[-1] < wanted[0] - 0.5
    for each, numbers in found:
        assert each == pytest.approx(wanted, abs=1e-4)
        assert (numbers["parameters"], numbers["calls"]) == (PARAMETERS, 0)
    # two moments of what trains, and each one's step
    steps = 4 * (2 * ROTATED["layers"] + 8)
    assert one["bytes"] == 8 * TRAINED + steps
    kept = sum(numbers["bytes"] - steps for _, numbers in found)
    copies = {"ddp on 2": 2, "hsdp on 4": 2}.get(layout, 1)
    assert kept == 8 * TRAINED * copies


@pytest.mark.slow
def test_goes_on_elsewhere_as_if_it_had_not_stopped(folder: Path) -> None:
    places = [(2, True), (1, False), (4, True), (2, False)]
    found: list[float] = []
    at = folder / "resumed"
    for number, (world, sharded) in enumerate(places):
        path = write(folder, POET, "resumed", clip=0.5)
        span = (3 * number, 3 * number + 3)
        results = harness.run(
            world, losses, path, sharded, span, load=at if number else None, save=at
        )
        found += results[0][0]
    assert found == pytest.approx(alone(folder)[0], abs=1e-4)
    for changes, said in (
        ({"block": 4}, "optimizer.block was 8, now it is 4"),
        ({"seed": 1}, "optimizer.seed was 0, now"),
        ({"merge_every": 3}, "optimizer.merge_every was 4, now"),
        ({"clip_ramp": 0}, "optimizer.clip_ramp was 2, now"),
        ({"type": "Muon", "scalars": []}, 'optimizer.type was "POET", now it is "Muon"'),
    ):
        optimizer = {"type": "Muon"} if "type" in changes else {**POET, **changes}
        path = write(folder, optimizer, clip=0.5)
        harness.run_refused(2, said, losses, path, True, (12, 12), load=at)
    same = write(folder, {**POET, "variant": "memory"}, clip=0.5)
    harness.run(2, losses, same, True, (12, 12), load=at)


@pytest.mark.slow
def test_half_precision(folder: Path) -> None:
    """W in bfloat16, and what trains in float32 where FSDP2 wants it of one dtype."""
    wanted = alone(folder)[0]
    for keys in ({"dtype": "bfloat16"}, {"param_dtype": "bfloat16"}):
        path = write(folder, POET, clip=0.5, **keys)
        for world, sharded in ((2, True), (2, False)):
            if "param_dtype" in keys and not sharded:
                continue
            found, numbers = harness.run(world, losses, path, sharded)[0]
            half = {"torch.bfloat16"} if "dtype" in keys else set()
            assert numbers["dtypes"] == {"torch.float32"} | half
            assert found != wanted
            assert found == pytest.approx(wanted, abs=0.15)


@pytest.mark.slow
def test_reports_at_merges_only(folder: Path) -> None:
    path = write(folder, POET, clip=0.5, monitor_every=3)
    for _, numbers in harness.run(2, losses, path, True)[:1]:
        assert numbers["watched"] == [4, 8, 12]


GOOD = {"optimizer": POET, "batch": 8, "steps": 12}


def test_what_the_yaml_says(tmp_path: Path) -> None:
    config = torch_config.read(write(tmp_path, POET))
    assert config.rotates
    assert config.rotation == {"block": 8, "init": "normalized"}
    assert config.routing == {"scalars": POET["scalars"]}
    assert (config.options.lr, config.options.merge_every) == (0.01, 4)
    own = config.identity()["optimizer"]
    assert (own["block"], own["order"], own["clip_ramp"]) == (8, 4, 2)
    assert "variant" not in own
    assert torch_config.read(write(tmp_path, {"type": "Muon"})).rotation == {}


@pytest.mark.parametrize(
    ("optimizer", "keys", "said"),
    [
        ({"block": 0.5}, {}, "optimizer: block is 0.5; write a whole number, at least 2"),
        ({"form": "fully"}, {}, "optimizer: form is 'fully'; unknown"),
        ({"blok": 8}, {}, "optimizer: unknown option 'blok'; did you mean 'block'"),
        ({"momentum": 0.9}, {}, "optimizer: unknown option 'momentum'"),
        ({"split": {"qkv": 3}}, {}, "optimizer: split has no effect: POET orthogonalizes no"),
        ({"merge_every": 0}, {}, "optimizer: merge_every is 0"),
        ({}, {"clip": 0}, "optimizer: clip_ramp has no effect with clip: 0"),
        ({}, {"tensor_parallel": 2}, "tensor_parallel: POET has it with --engine megatron only"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, optimizer: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=rf"a\.yaml: {said}"):
        torch_config.read(write(tmp_path, {**POET, **optimizer}, **keys))


def test_a_block_that_does_not_fit(folder: Path) -> None:
    path = write(folder, {**POET, "block": 7})
    said = r"a\.yaml: optimizer: .*block 7 does not divide"
    harness.run_refused(2, said, losses, path, True, (0, 0))


# -- what comes out


def test_the_exported_model_is_a_plain_llama(tmp_path: Path) -> None:
    """Of plain transformers, saved and loaded by it: the logits of the trained one."""
    config = LlamaConfig.from_dict(MODEL)
    model: Any = poet.convert(llama.build(config, 0), block=8, init="normalized")
    with quiet():
        groups = spectral_dist.param_groups(model)
    optimizer = spectral_dist.POET(groups, lr=0.02, merge_every=2)
    for step in range(3):
        rows = rows_of(step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = poet.export(model)
    plain: Any = LlamaForCausalLM(config)
    assert exported.keys() == plain.state_dict().keys()
    plain.load_state_dict(exported)
    plain.save_pretrained(tmp_path)
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    rows = rows_of(9)
    with torch.no_grad():
        wanted, *found = (m.eval()(input_ids=rows).logits for m in (model, plain, again))
    assert float(wanted.abs().max()) > 0.5
    for logits in found:
        assert float((logits - wanted).abs().max()) < 1e-5
    assert torch.equal(*found)


# -- the command


def refusal(job: LaunchedJob, *options: str) -> str:
    model = ("--model", str(job.folder / "model.json"), "--out", str(job.folder / "a"))
    data = ("--data", str(job.folder / "data"))
    result = CliRunner().invoke(app, [*model, *data, *options])
    if dist.is_initialized():  # a process of its own would end here
        dist.destroy_process_group()
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_config_or_optimizer(job: LaunchedJob) -> None:
    config = str(ROOT / "configs/torch/poet.yaml")
    both = refusal(job, "--engine", "ddp", "--config", config, "--optimizer", "poet")
    assert "both are given: write either --config FILE or --optimizer NAME" in both
    assert "neither is given: write either --config" in refusal(job, "--engine", "ddp")
    unknown = refusal(job, "--engine", "ddp", "--optimizer", "moun")
    assert "unknown optimizer 'moun'; did you mean 'muon'?" in unknown
    none = refusal(job, "--engine", "megatron", "--optimizer", "adamw")
    assert "no configuration of adamw is shipped for --engine megatron; there are muon" in none
    # the shipped one is what is read: its blocks do not fit this tiny model
    said = refusal(job, "--engine", "fsdp", "--optimizer", "poet", "--seq-len", "16")
    assert "configs/torch/poet.yaml: optimizer: " in said
    assert "block 64 does not divide" in said


@pytest.mark.slow
def test_short_names_of_every_engine(job: LaunchedJob) -> None:
    for engine, names in (
        ("deepspeed", ("muon", "polargrad", "root", "sumo", "adamw")),
        ("ddp", ("muon", "polargrad", "root", "sumo", "poet", "adamw")),
    ):
        for name in names:
            said = refusal(job, "--engine", engine, "--optimizer", name, "--seq-len", "4096")
            assert "--seq-len 4096: the model's max_position" in said


@pytest.mark.slow
def test_ddp_alone_and_resumed(job: LaunchedJob) -> None:
    config = job.folder / "poet.yaml"
    own = {**POET, "merge_every": 2}
    config.write_text(
        yaml.safe_dump({"optimizer": own, "batch": 8, "micro_batch": 2, "steps": STEPS})
    )
    options = ("--engine", "ddp", "--config", str(config))
    job.in_turn(
        ("whole", *options),
        ("parts", *options, "--stop-at", "3"),
        ("parts", *options, "--resume"),
    )
    assert job.losses("parts") == job.losses("whole")
    assert job.losses("parts", "validation") == job.losses("whole", "validation")
    summary: Any = job.summary("whole")
    assert (summary["parameters"], summary["trained_parameters"]) == (PARAMETERS, TRAINED)
    assert (summary["optimizer"], summary["optimizer_bytes_sent"]) == ("POET", 0)
