"""Llama models from a JSON file, with initial weights that depend on seed and name alone."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from spectral_dist._errors import nearest
from spectral_dist.launch import files

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE = ("rope_scaling", "rope_parameters")
NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of a LlamaConfig that change nothing of what is trained here."""


def load_config(path: Path) -> Any:
    """The LlamaConfig in a JSON file. ValueError: unreadable, of another model type, or wrong."""
    try:
        fields = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"cannot read the model {path}: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") != "llama":
        raise ValueError(f'{path}: expected a LlamaConfig, with "model_type": "llama"')
    known = {*LlamaConfig().to_dict(), *SIZES, *NUMBERS, *TOKENS, *NO_MATTER, *ROPE}
    for name, value in fields.items():
        meant = None if name in known else nearest(name, known)
        if meant:  # what else transformers does not know, it keeps without a word
            raise ValueError(f"{path}: unknown field {name!r}; did you mean {meant!r}?")
        wrong = _wrong(name, value)
        if wrong:
            raise ValueError(f"{path}: {name} is {value!r}; it must be {wrong}")
    try:
        config = LlamaConfig.from_dict(fields)
        small = copy.deepcopy(config)
        small.num_hidden_layers = 1
        with torch.device("meta"):  # its layers say what it does not say of its fields
            LlamaForCausalLM(small)(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except Exception as error:  # transformers has its own kinds, and those of what it calls
        what = " ".join(str(error).split())
        raise ValueError(f"{path}: no Llama can be built from it: {what}") from error
    return config


def _wrong(name: str, value: Any) -> str | None:
    """What a field of a LlamaConfig must be, if it is not."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or isinstance(value, float)
    if name in SIZES and not (whole and value >= 1):
        return "a whole number, at least 1"
    if name in NUMBERS and not (number and 0 < value < math.inf):
        return "a number above 0"
    several = name == "eos_token_id" and isinstance(value, list) and value
    tokens = value if several else [value]
    if name in TOKENS and value is not None and not all(type(token) is int for token in tokens):
        return "a whole number, or null"
    if name == "attention_dropout" and not (number and 0 <= value <= 1):
        return "a number from 0 to 1"
    if name in ROPE and not (value is None or isinstance(value, dict)):
        return "an object, or null"
    if name == "hidden_act" and value not in list(ACT2FN):
        return f"one of {', '.join(ACT2FN)}"
    if name == "architectures" and value != ["LlamaForCausalLM"]:
        return '["LlamaForCausalLM"]'
    return None


def identity(config: Any) -> dict[str, Any]:
    """All that a LlamaConfig says of a model, as JSON; and by which release of transformers."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in values.items() if name not in NO_MATTER}


def comparable(saved: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two identities without what only one release of transformers knows, if there are two."""
    release = "transformers_version"
    names = saved.keys() | now.keys()
    if saved.get(release) != now.get(release):
        names = saved.keys() & now.keys()
    names -= {release}
    saved, now = ({k: v for k, v in values.items() if k in names} for values in (saved, now))
    return saved, now


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
        values = initial(name, shape, seed, std)
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values)
        else:
            parameter.copy_(values)


def initial(name: str, shape: Sequence[int], seed: int, std: float) -> Tensor:
    """The initial values of a parameter: those of its name, whichever rank asks."""
    if len(shape) < 2:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(_seed(seed, name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def shrink(model: Any, full: bool = False) -> tuple[Any, str]:
    """A model of the same kind that a CPU can step in seconds, and a note of what was reduced.

    The checks are about the configuration, not about size: two layers, and widths of at most 256.
    """
    small = copy.deepcopy(model)
    if full:
        return small, "the model as it is"
    small.num_hidden_layers = min(model.num_hidden_layers, 2)
    small.vocab_size = min(model.vocab_size, 1024)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(getattr(small, token, None), int) and getattr(small, token) >= 1024:
            setattr(small, token, 0)
    factor = max(1, math.ceil(model.hidden_size / 256))
    heads = max(1, model.num_attention_heads // factor)
    groups = max(1, model.num_attention_heads // model.num_key_value_heads)
    small.num_key_value_heads = max(1, heads // groups)
    small.num_attention_heads = small.num_key_value_heads * groups
    small.head_dim = model.hidden_size // model.num_attention_heads
    small.hidden_size = small.num_attention_heads * small.head_dim
    small.intermediate_size = max(1, model.intermediate_size // factor)
    return small, (
        f"{small.num_hidden_layers} of {model.num_hidden_layers} layers, hidden"
        f" {small.hidden_size} of {model.hidden_size} (--full for all of it)"
    )
