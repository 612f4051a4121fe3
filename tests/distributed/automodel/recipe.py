"""Automodel's fine-tuning recipe, a tiny random Qwen2; for ranks alone, as it changes torch."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.support import megatron_cpu

STEPS, SAVED_AT = 4, 2


def on_cpu() -> None:
    """Let Automodel train without a GPU."""
    for name in (
        "set_device", "empty_cache", "synchronize", "reset_peak_memory_stats", "manual_seed_all",
    ):  # fmt: skip
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: 0
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *args: 0)

    def device(asked: Any) -> Any:
        is_gpu = type(asked) is int or (
            isinstance(asked, str | torch.device) and "cuda" in str(asked)
        )
        return megatron_cpu.CPU if is_gpu else asked

    megatron_cpu.on_cpu = device
    megatron_cpu.OnCPU().__enter__()
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_accelerator = lambda *args, **kwargs: torch.device("cpu")
    torch.accelerator.synchronize = torch.accelerator.set_device_index = lambda *args: None
    to, barrier = nn.Module.to, dist.barrier
    nn.Module.to = lambda module, *args, **kwargs: to(
        module, *map(device, args), **{name: device(value) for name, value in kwargs.items()}
    )
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)

    import nemo_automodel.components.training.utils as utils

    def clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    utils._clip_grad_norm_impl = clip  # its own is of triton or Transformer Engine


def tiny(**others: Any) -> Any:
    """The config of a model of two layers."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, **others,
    )  # fmt: skip


def configuration(folder: str, start: str, optimizer: dict[str, Any]) -> dict[str, Any]:
    restore = {} if start == "fresh" else {"restore_from": start}
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": 1,
        "dist_env": {"backend": "gloo", "timeout_minutes": 5},
        "step_scheduler": {
            "global_batch_size": 4, "local_batch_size": 2, "ckpt_every_steps": SAVED_AT,
            "max_steps": STEPS, "num_epochs": 5, "val_every_steps": 1000,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {"_target_": "tests.distributed.automodel.recipe.tiny"},
            "attn_implementation": "eager", "torch_dtype": "float32",
        },
        "checkpoint": {
            "enabled": True, "checkpoint_dir": folder, "model_save_format": "torch_save",
            "save_consolidated": False, **restore,
        },
        "distributed": {
            "strategy": "fsdp2", "tp_size": 1, "cp_size": 1,
            "dp_size": int(os.environ["WORLD_SIZE"]),
            # float32, as one process without FSDP2 computes
            "mp_policy": {"_target_": "torch.distributed.fsdp.MixedPrecisionPolicy"},
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset",
            "num_sentences": 16, "vocab_size": 64, "max_sentence_len": 12,
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
            "shuffle": False,
        },
        "clip_grad_norm": {"max_norm": 1.0},
        **optimizer,
    }  # fmt: skip


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Write weights that depend on the parameter's name alone."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = torch.randn(p.shape, generator=random) / p.shape[-1] ** 0.5
            is_cut = isinstance(p, DTensor)
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements) if is_cut else whole)


def lines(folder: str, start: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses and rates of each step of a run, which "fresh" or a checkpoint of it begins.

    Args:
        folder: where its checkpoints are.
        start: "fresh", or the name of the checkpoint to resume from.
        wanted: sections of the YAML.
    """
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm import train_ft

    path = Path(folder, f"recipe{os.environ['RANK']}.yaml")
    path.write_text(yaml.safe_dump(configuration(folder + "/run", start, wanted)))
    recipe = train_ft.TrainFinetuneRecipeForNextTokenPrediction(load_yaml_config(str(path)))
    recipe.setup()
    if start == "fresh":
        for part in recipe.model_parts:
            fill(part)
    step = recipe._run_train_optim_step
    steps = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        sample = step(*args, **kwargs)
        rates = {g["kind"]: [g["lr"], g["weight_decay"]] for g in recipe.optimizer[0].param_groups}
        steps.append({"loss": float(sample.metrics["loss"]), "rates": rates})
        return sample

    recipe._run_train_optim_step = watched
    recipe.run_train_validation_loop()
    return steps


on_cpu()
