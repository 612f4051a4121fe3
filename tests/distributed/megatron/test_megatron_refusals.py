"""What is not supported is an error on every rank, before anything is built, that says why."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.distributed.megatron import megatron_runs as runs
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

NEW, OLD = "0.19.2", "0.16.1"
CASES: list[tuple[str, str, Any, str, str]] = [
    ("optimizer", "optimizer_cpu_offload", True, "HybridDeviceOptimizer", "leave it off"),
    ("optimizer", "use_precision_aware_optimizer", True, "TransformerEngine", "leave it off"),
    ("optimizer", "main_params_dtype", torch.float16, "are float32", "leave it at torch.float32"),
    ("optimizer", "main_grads_dtype", torch.bfloat16, "are float32", "leave it at torch.float32"),
    ("optimizer", "exp_avg_dtype", torch.bfloat16, "are float32", "leave it at torch.float32"),
    ("optimizer", "exp_avg_sq_dtype", torch.bfloat16, "are float32", "leave it at torch.float32"),
    ("ddp", "fp8_param_gather", True, "quantized", "--fp8-format"),
    ("ddp", "fp4_param_gather", True, "quantized", "--fp4-format"),
    ("model", "fp8_param", True, "quantized", "--fp8-format"),
    ("model", "fp4_param", True, "quantized", "--fp4-format"),
    ("model", "moe_single_grouped_weight", True, "all experts", "leave it off"),
    ("ddp", "num_distributed_optimizer_instances", 2, "above 1", "set it to 1"),
]


def refused(version: str, cases: list[tuple[str, str, Any, str, str]]) -> list[str]:
    """What building says of each setting; some need a GPU's packages, so all are set afterwards."""
    _, ddp, _ = runs.build(version, "adam")
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    texts = []
    for owner, setting, value, *_ in cases:
        config = models.optimizer_config(ddp, optimizer="spectral_muon")
        changed = {"optimizer": config, "ddp": ddp.ddp_config, "model": ddp.config}[owner]
        before = getattr(changed, setting, None)
        setattr(changed, setting, value)
        try:
            get_spectral_megatron_optimizer(config, [ddp])
        except ValueError as error:
            texts.append(str(error))
        finally:
            setattr(changed, setting, before)
    return texts


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_settings_are_refused_with_the_reason_and_what_to_write(version: str) -> None:
    for texts in harness.run(2, refused, version, CASES, pool=version):
        for (_, setting, _, reason, fix), text in zip(CASES, texts, strict=True):
            assert text.startswith("spectral optimizers do not support " + setting), text
            assert reason in text
            assert fix in text


def sharded_by_megatron(version: str, strategy: str) -> tuple[set[str], str]:
    """How Megatron-FSDP has stored the weights, and what building says of them."""
    megatron_cpu.install(version)
    models.parallel()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    settings = DistributedDataParallelConfig(
        use_megatron_fsdp=True, use_distributed_optimizer=True,
        data_parallel_sharding_strategy=strategy,
    )  # fmt: skip
    model = models.gpt()
    sharded = FullyShardedDataParallel(model.config, settings, model, device=torch.device("cpu"))
    kinds = {type(p).__name__ for p in sharded.parameters()}
    try:
        get_spectral_megatron_optimizer(
            models.optimizer_config(sharded, optimizer="spectral_muon"), [sharded]
        )
    except ValueError as error:
        return kinds, str(error)
    return kinds, "nothing was raised"


@pytest.mark.parametrize(
    "strategy", ["optim_grads_params", pytest.param("no_shard", marks=pytest.mark.slow)]
)
def test_megatrons_sharding_is_refused_with_what_to_write(strategy: str) -> None:
    for kinds, text in harness.run(2, sharded_by_megatron, NEW, strategy, pool=NEW):
        assert kinds == {"DTensor"}
        assert "do not support use_megatron_fsdp (--use-megatron-fsdp)" in text
        assert "write --use-distributed-optimizer" in text


def sharded_by_torch():
    """What building says of a model under --use-torch-fsdp2."""
    megatron_cpu.install(NEW)
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed import torch_fully_sharded_data_parallel as module

    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    def on_cpu(group, kind):
        return DeviceMesh.from_group(group, "cpu")

    models.parallel()
    model = models.gpt()
    settings = models.optimizer_config(models.wrap(model), optimizer="spectral_muon")
    module.DeviceMesh, plain = types.SimpleNamespace(from_group=on_cpu), module.DeviceMesh
    try:
        sharded = module.TorchFullyShardedDataParallel(
            model.config, DistributedDataParallelConfig(), model, sub_modules_to_wrap=set()
        )
        get_spectral_megatron_optimizer(settings, [sharded])
    except ValueError as error:
        return str(error)
    finally:
        module.DeviceMesh = plain
    return "nothing was raised"


def test_torchs_sharding_is_refused_with_what_to_write():
    for text in harness.run(2, sharded_by_torch, pool=NEW):
        assert "do not support use_torch_fsdp2 (--use-torch-fsdp2)" in text
        assert "write --use-distributed-optimizer" in text
