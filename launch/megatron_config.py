"""Read and check the YAML of --engine megatron (configs/megatron), and whether it can run here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_dist.launch import yaml_config
from spectral_dist.launch.yaml_config import FLAG, Constraint, RunConfig, integer_from
from spectral_dist.rules import registry
from spectral_dist.rules.options import BaseOptions


def optimizers() -> dict[str, type[BaseOptions]]:
    """Return the options class of every optimizer by its type in the YAML."""
    return {entry.megatron_name: entry.options for entry in registry.entries()}


ADAM = "adam"  # Megatron's own
SHARDED_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""Sizes that tensor parallelism divides among its ranks."""
REQUIRED_VALUES = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
"""Values that a LlamaConfig must have, since the models built here have no others."""


@dataclass(frozen=True)
class MegatronConfig(RunConfig):
    """The settings of a run with Megatron-core; sizes and switches have Megatron's names.

    With ``dtype: bfloat16`` there are float32 master weights.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change.

        The distributed optimizer is one of them, since it has other states.
        """
        return {
            **super().identity(),
            "use_distributed_optimizer": self.use_distributed_optimizer,
        }

    def check_model(self, model: Any) -> None:
        """Check that this engine can build a model, and tensor parallelism divide it evenly.

        Args:
            model: a LlamaConfig.

        Raises:
            ValueError: names the setting of the model.
        """
        tensor_parallel = self.tensor_parallel
        for name in SHARDED_SIZES:
            size = getattr(model, name)
            if size % tensor_parallel:
                raise self.fail(
                    "tensor_parallel",
                    f"the model's {name}, {size}, is no multiple of {tensor_parallel}",
                )
        required: dict[str, tuple[Any, Any]] = {
            name: (getattr(model, name), value) for name, value in REQUIRED_VALUES.items()
        }
        required["hidden_act"] = (model.hidden_act, "silu")
        required["rope_type"] = (model.rope_parameters.get("rope_type", "default"), "default")
        for name, (actual, value) in required.items():
            if actual != value:
                raise ValueError(
                    f"the model's {name} is {actual!r}; --engine megatron builds Llamas with"
                    f" {value!r}"
                )


CONSTRAINTS: dict[str, Constraint] = {
    **yaml_config.CONSTRAINTS,
    "tensor_parallel": integer_from(1),
    "pipeline_parallel": integer_from(1),
    "sequence_parallel": FLAG,
    "use_distributed_optimizer": FLAG,
}


def read(path: Path) -> MegatronConfig:
    """Read and check a configuration.

    Raises:
        ValueError: names the file and the key.
    """
    example = "configs/megatron/tiny_muon.yaml"
    config = MegatronConfig(
        **yaml_config.read(path, MegatronConfig, optimizers(), ADAM, CONSTRAINTS, example)
    )
    if config.pipeline_parallel > 1:
        raise config.fail(
            "pipeline_parallel",
            "this release of --engine megatron has 1 only; launch/megatron.sh runs Megatron-LM's"
            " own script, which has more",
        )
    if config.sequence_parallel and config.tensor_parallel == 1:
        raise config.fail("sequence_parallel", "it needs tensor_parallel above 1")
    segments = config.rotation.get("segments", 1)
    if config.rotates and segments % config.tensor_parallel:
        raise config.fail(
            "tensor_parallel",
            f"the optimizer's segments, {segments}, are no multiple of it; write segments:"
            f" {config.tensor_parallel}, or a multiple of every tensor_parallel to be used",
        )
    if config.options.scalar_weight_decay is not None:
        raise config.fail(
            "optimizer",
            "scalar_weight_decay has no effect here: Megatron decays all but 1-D parameters by"
            " weight_decay",
        )
    return config


def prepare() -> None:
    """Check that this machine has GPUs and megatron-core.

    Raises:
        ValueError: it has not.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--engine megatron needs GPUs, and torch finds none here; --engine ddp and fsdp run on"
            " CPUs"
        )
    if importlib.util.find_spec("megatron") is None:
        raise ValueError("--engine megatron needs: pip install 'spectral-dist[megatron]'")
