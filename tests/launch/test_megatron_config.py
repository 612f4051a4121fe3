"""The YAML of --engine megatron: what it may say, and what is wrong in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from spectral_dist.launch import megatron_config
from spectral_dist.launch.pretrain import app
from tests.launch.jobs import ROOT, LaunchedJob
from tests.launch.megatron_runs import GROUPED, VERSION
from tests.support import harness, megatron_cpu

GOOD = """
optimizer: {type: spectral_muon, lr: 1e-2, scalars: [linear_qkv], polar_steps: 6}
batch: 8
steps: 25
tensor_parallel: 2
"""


def read(folder: Path, text: str) -> megatron_config.MegatronConfig:
    path = folder / "x.yaml"
    path.write_text(text)
    return megatron_config.read(path)


def test_what_it_says_and_what_it_leaves_open(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert (config.kind, config.options.lr, config.options.momentum) == (
        "spectral_muon",
        0.01,
        0.95,
    )
    assert config.routing == {"scalars": ["linear_qkv"]}
    assert (config.batch, config.steps, config.warmup, config.save_every) == (8, 25, 2, 0)
    assert (config.tensor_parallel, config.pipeline_parallel) == (2, 1)
    assert (config.sequence_parallel, config.use_distributed_optimizer) == (False, False)
    config = read(tmp_path, GOOD + "save_every: 5\nuse_distributed_optimizer: true")
    assert (config.save_every, config.use_distributed_optimizer) == (5, True)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tensor_p", "tensr_p", "unknown key 'tensr_parallel'; did you mean 'tensor_parallel'"),
        ("batch: 8", "batch: 8\nmesh: {shard: 2}", "unknown key 'mesh'"),
        ("batch: 8", "batch: 8\ntensor_model_parallel_size: 2", "did you mean 'tensor_parallel'"),
        ("parallel: 2", "parallel: 0", "tensor_parallel is 0; it must be a whole number"),
        ("batch: 8", "batch: 8\nsequence_parallel: 1", "sequence_parallel is 1; .* true or false"),
        ("parallel: 2", "parallel: 1\nsequence_parallel: true", "sequence_parallel: it needs"),
        ("batch: 8", "batch: 8\npipeline_parallel: 2", "pipeline_parallel: this release"),
        ("spectral_muon", "spectral_moun", "optimizer: unknown type .*; did you mean 'spectral_mu"),
        ("spectral_muon", "adam", "optimizer: adam has no option 'scalars'"),
        ("polar_steps", "polar_step", "optimizer: unknown option .*; did you mean 'polar_steps'"),
        ("polar_steps: 6", "scalar_weight_decay: 0.1", "optimizer: scalar_weight_decay has no"),
        (GOOD.strip(), "a", "expected keys and values, as in configs/megatron/tiny_muon.yaml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=rf"x\.yaml.*{said}"):
        read(tmp_path, GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_key_value_heads": 1}, "tensor_parallel: the model's num_key_value_heads, 1, is no"),
        ({"vocab_size": 321}, "tensor_parallel: the model's vocab_size, 321, is no multiple of 2"),
        ({"mlp_bias": True}, "the model's mlp_bias is True; .* with False"),
        ({"hidden_act": "gelu"}, "the model's hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ],
)
def test_models_that_it_does_not_build(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    config = read(tmp_path, GOOD)
    config.check_model(LlamaConfig.from_dict(GROUPED))
    with pytest.raises(ValueError, match=said):
        config.check_model(LlamaConfig.from_dict({**GROUPED, **fields}))


def options_types() -> dict[str, str]:
    megatron_cpu.install(VERSION)
    from spectral_dist.integrations.megatron import TYPES

    return {name: cls.options_type.__name__ for name, cls in TYPES.items()}


def test_optimizers_are_those_of_the_integration() -> None:
    found = harness.run(1, options_types, pool=VERSION)[0]
    known = megatron_config.optimizers().items()
    assert found == {name: options.__name__ for name, options in known}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with GPUs")
def test_it_needs_gpus(job: LaunchedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ROOT / "configs/megatron/tiny_muon.yaml"
    arguments = [*job.arguments("a"), "--engine", "megatron", "--config", str(config)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--engine megatron needs GPUs, and torch finds none here" in result.output
    result = CliRunner().invoke(app, [*arguments, "--steps", "2"])
    assert "--steps belongs to --engine deepspeed" in result.output
