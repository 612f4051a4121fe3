"""The YAML of --engine megatron (configs/megatron), and what that engine needs of the machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_dist.launch import yaml_config
from spectral_dist.launch.yaml_config import FLAG, Rule, RunConfig, whole
from spectral_dist.rules import registry
from spectral_dist.rules.options import BaseOptions


def optimizers() -> dict[str, type[BaseOptions]]:
    """Return the options of every optimizer by its type in the YAML."""
    return {entry.megatron_name: entry.options for entry in registry.entries()}


ADAM = "adam"  # Megatron's own
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""What tensor parallelism cuts."""
NO_EFFECT = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
"""What a LlamaConfig may say, and has to say here."""


@dataclass(frozen=True)
class MegatronConfig(RunConfig):
    """Sizes and switches have Megatron's names. ``dtype``: bfloat16 has float32 masters."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False

    def identity(self) -> dict[str, Any]:
        """Also what decides which states there are."""
        return {
            **super().identity(),
            "use_distributed_optimizer": self.use_distributed_optimizer,
        }

    def check_model(self, model: Any) -> None:
        """ValueError for a LlamaConfig that is not built here, or not cut evenly."""
        across = self.tensor_parallel
        for name in DIVIDED:
            if getattr(model, name) % across:
                raise self.fail(
                    "tensor_parallel",
                    f"the model's {name}, {getattr(model, name)}, is no multiple of {across}",
                )
        wanted: dict[str, tuple[Any, Any]] = {
            name: (getattr(model, name), value) for name, value in NO_EFFECT.items()
        }
        wanted["hidden_act"] = (model.hidden_act, "silu")
        wanted["rope_type"] = (model.rope_parameters.get("rope_type", "default"), "default")
        for name, (found, value) in wanted.items():
            if found != value:
                raise ValueError(
                    f"the model's {name} is {found!r}; --engine megatron builds Llamas with"
                    f" {value!r}"
                )


RULES: dict[str, Rule] = {
    **yaml_config.RULES,
    "tensor_parallel": whole(1),
    "pipeline_parallel": whole(1),
    "sequence_parallel": FLAG,
    "use_distributed_optimizer": FLAG,
}


def read(path: Path) -> MegatronConfig:
    """A configuration, checked. ValueError: the message names the file and the key."""
    example = "configs/megatron/tiny_muon.yaml"
    config = MegatronConfig(
        **yaml_config.read(path, MegatronConfig, optimizers(), ADAM, RULES, example)
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
    """Make sure that megatron-core can be imported and run. ValueError: it cannot."""
    if not torch.cuda.is_available():
        raise ValueError(
            "--engine megatron needs GPUs, and torch finds none here; --engine ddp and fsdp run on"
            " CPUs"
        )
    if importlib.util.find_spec("megatron") is None:
        raise ValueError("--engine megatron needs: pip install 'spectral-dist[megatron]'")
