"""--engine megatron: the run of plain torch, however it is cut and wherever it stops."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch import torch_runs
from tests.launch.jobs import ROOT, LaunchedJob
from tests.launch.megatron_runs import GROUPED, TIED, VERSION, compared, losses, parsed
from tests.launch.torch_runs import write
from tests.support import harness

MATRICES = 2 * 7
KINDS = {
    "spectral_muon": {"type": "Muon", "lr": 0.01},
    "spectral_polargrad": {"type": "PolarGrad", "lr": 0.3, "scalar_lr": 0.01},
    "spectral_root": {"type": "ROOT", "lr": 0.01},
    "adam": {"type": "AdamW", "lr": 0.01},
}
DISTRIBUTED = {"use_distributed_optimizer": True}
TP = {"tensor_parallel": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2 x DP 2, distributed optimizer": (4, {**TP, **DISTRIBUTED, "monitor_every": 4}),
    "TP 2, sequence parallel": (2, {**TP, "sequence_parallel": True}),
}


def config(folder: Path, kind: str = "spectral_muon", name: str = "a", **keys: Any) -> Path:
    # Megatron does not decay norms; the others do.
    optimizer = {**KINDS[kind], "type": kind, "weight_decay": 0.0}
    return write(folder, optimizer, name, **keys)


@functools.cache
def alone(kind: str, folder: Path) -> list[float]:
    """The run of plain torch in one process."""
    path = write(folder, {**KINDS[kind], "weight_decay": 0.0}, f"{kind}_torch")
    return harness.run(1, torch_runs.losses, path, False, model=GROUPED)[0][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


def run(world: int, path: Path, **given: Any) -> list[Any]:
    return harness.run(world, losses, path, pool=VERSION, **given)


def agrees(folder: Path, kind: str, layout: str, bound: float) -> None:
    world, keys = LAYOUTS[layout]
    found = run(world, config(folder, kind, **keys))
    wanted = alone(kind, folder)
    assert wanted[-1] < wanted[0] - 0.5
    assert found[0][0] == pytest.approx(wanted, abs=bound)
    assert all(each == found[0][0] for each, _ in found)
    assert sum(numbers["calls"] for _, numbers in found) == (
        0 if kind == "adam" else 12 * MATRICES  # no matrix twice
    )
    assert found[0][1]["watched"] == ([4, 8, 12] if "monitor_every" in keys else [])
    for _, numbers in found:
        assert numbers["parameters"] == 2 * 320 * 32 + 2 * (2 * 32 * 48 + 3 * 32 * 48 + 64) + 32
        assert numbers["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("TP 2 x DP 2, distributed optimizer")
def test_it_is_the_run_of_plain_torch(folder: Path, layout: str) -> None:
    agrees(folder, "spectral_muon", layout, 1e-4)


@pytest.mark.parametrize("kind", ["spectral_polargrad", "adam"])
@pytest.mark.slow
def test_with_every_optimizer(folder: Path, kind: str) -> None:
    agrees(folder, kind, "TP 2, sequence parallel", 1e-3)


def test_outputs_are_those_of_transformers(folder: Path) -> None:
    path = config(folder, **LAYOUTS["TP 2, sequence parallel"][1])
    for model in (GROUPED, TIED):
        for found in harness.run(2, compared, path, model, pool=VERSION):
            assert max(found) < 1e-5


@pytest.mark.slow
def test_the_shipped_configuration_resumes_on_any_ranks(tmp_path: Path) -> None:
    shipped = ROOT / "configs/megatron/tiny_muon.yaml"
    said = {**yaml.safe_load(shipped.read_text()), "steps": 8, "batch": 8, "warmup": 2}
    (path := tmp_path / "tiny.yaml").write_text(yaml.safe_dump(said))
    model = json.loads((ROOT / "configs/models/tiny.json").read_text())
    at = tmp_path / "checkpoints"
    whole, numbers = run(4, path, model=model, steps=(0, 8))[0]
    assert whole[-1] < whole[0] - 0.5
    assert whole[0] == pytest.approx(math.log(1024), rel=0.05)
    first = run(4, path, model=model, steps=(0, 4), save=at)[0][0]
    assert (at / "latest").read_text() == "step_000004"
    rest, resumed = run(4, path, model=model, steps=(4, 8), load=at)[0]
    assert first + rest == whole
    assert resumed["lr"] == numbers["lr"] == pytest.approx(0.001)
    (path := tmp_path / "other.yaml").write_text(yaml.safe_dump({**said, "tensor_parallel": 1}))
    elsewhere = run(2, path, model=model, steps=(4, 8), load=at)[0][0]
    assert elsewhere == pytest.approx(whole[4:], abs=1e-4)
    (path := tmp_path / "lr.yaml").write_text(
        yaml.safe_dump({**said, "use_distributed_optimizer": False})
    )
    with pytest.raises(
        harness.RankError, match="use_distributed_optimizer was true, now it is false"
    ):
        run(4, path, model=model, steps=(4, 8), load=at)


@pytest.mark.slow
def test_half_precision_resumes_too(folder: Path) -> None:
    path = config(folder, dtype="bfloat16", **TP)
    whole, numbers = run(2, path)[0]
    assert numbers["dtypes"] == {"torch.bfloat16"}
    assert whole != alone("spectral_muon", folder)
    assert whole == pytest.approx(alone("spectral_muon", folder), abs=0.15)
    first = run(2, path, steps=(0, 6), save=folder / "half")[0][0]
    assert first + run(2, path, steps=(6, 12), load=folder / "half")[0][0] == whole


@pytest.mark.slow
def test_pretrain_runs_it(job: LaunchedJob) -> None:
    job.script_of_ranks = (str(ROOT / "tests/launch/megatron_pretrain.py"), VERSION)
    options = ("--engine", "megatron", "--config", str(ROOT / "configs/megatron/tiny_muon.yaml"))
    assert "Megatron's local" in job.ranks(4, "whole", *options, "--stop-at", "6")
    job.ranks(4, "parts", *options, "--stop-at", "3")
    job.ranks(4, "parts", *options, "--stop-at", "6", "--resume")
    assert job.losses("parts") == job.losses("whole")
    assert job.losses("whole")[-1] < job.losses("whole")[0] - 0.3
    assert job.summary("whole")["matrices_orthogonalized"] == 6 * MATRICES


@pytest.mark.parametrize("size", ["8b", "70b"])
def test_megatron_knows_every_flag_of_the_script(job: LaunchedJob, size: str) -> None:
    echo = job.folder / "python"
    echo.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    echo.chmod(0o755)
    settings = yaml.safe_load((ROOT / f"configs/megatron/llama_{size}.yaml").read_text())
    model = json.loads((ROOT / f"configs/models/llama_{size}.json").read_text())
    job.env |= {"PYTHON": str(echo), "SIZE": size, "MEGATRON_LM": "/m", "OUT": "/o"}
    for data in ("", "/d"):
        job.env |= {"DATA": data, "TOKENIZER": "/t"}
        words = job.script("megatron.sh").splitlines()
        flags = words[words.index("/m/pretrain_gpt.py") + 1 :]
        found = harness.run(1, parsed, flags, pool=VERSION)[0]
        assert (found["optimizer"], found["spectral_optimizer"]) == ("adam", "spectral_muon")
        assert found["spectral_momentum"] == settings["optimizer"]["momentum"]
        assert (found["save"], found["load"], found["ckpt_format"]) == ("/o", "/o", "torch_dist")
        same = {
            "lr": float(settings["optimizer"]["lr"]),
            "weight_decay": settings["optimizer"]["weight_decay"],
            "clip_grad": settings["clip"],
            "global_batch_size": settings["batch"],
            "train_iters": settings["steps"],
            "lr_warmup_iters": settings["warmup"],
            "tensor_model_parallel_size": settings["tensor_parallel"],
            "sequence_parallel": settings["sequence_parallel"],
            "use_distributed_optimizer": settings["use_distributed_optimizer"],
            "num_layers": model["num_hidden_layers"],
            "hidden_size": model["hidden_size"],
            "ffn_hidden_size": model["intermediate_size"],
            "num_attention_heads": model["num_attention_heads"],
            "num_query_groups": model["num_key_value_heads"],
            "layernorm_epsilon": model["rms_norm_eps"],
            "rotary_base": model["rope_parameters"]["rope_theta"],
        }
        assert {name: found[name] for name in same} == same
    job.env |= {"ENGINE": "megatron"}
    words = job.script("megatron.sh").splitlines()
    at = words.index(str(ROOT / "launch/pretrain.py"))
    assert words[at + 1 : at + 7] == [
        "--engine", "megatron", "--model", str(ROOT / f"configs/models/llama_{size}.json"),
        "--config", str(ROOT / f"configs/megatron/llama_{size}.yaml"),
    ]  # fmt: skip
