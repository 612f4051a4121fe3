"""Llama models from a JSON file, with initial weights that depend on seed and name alone."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def load_config(path: Path) -> Any:
    """The LlamaConfig in a JSON file. ValueError: unreadable, or of another model type."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the model {path}: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") != "llama":
        raise ValueError(f'{path}: expected a LlamaConfig, with "model_type": "llama"')
    return LlamaConfig.from_dict(fields)


def build(config: Any, seed: int, under: AbstractContextManager[Any] | None = None) -> nn.Module:
    """A float32 model, constructed inside the context `under` (deepspeed.zero.Init)."""
    with under or nullcontext():
        model: nn.Module = LlamaForCausalLM(config)
    _fill(model, seed, config.initializer_range)
    return model


@torch.no_grad()
def _fill(model: nn.Module, seed: int, std: float) -> None:
    """Normal matrices, norms of 1: the same numbers with or without zero.Init, on any device."""
    for name, parameter in model.named_parameters():
        # zero.Init leaves an empty stand-in; its shape is kept aside.
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        if len(shape) < 2:
            values = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(_seed(seed, name))
            values = torch.empty(shape).normal_(0.0, std, generator=generator)
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values)
        else:
            parameter.copy_(values)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
