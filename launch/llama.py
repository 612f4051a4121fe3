"""Read the config of a Llama and build the model; initial weights follow from seed and name."""

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
IRRELEVANT_FIELDS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of a LlamaConfig that have no effect on training here."""


def load_config(path: Path) -> Any:
    """Read the LlamaConfig in a JSON file.

    Raises:
        ValueError: the file cannot be read, is of another model type, or is wrong.
    """
    try:
        fields = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"cannot read the model {path}: {error}") from None
    if not isinstance(fields, dict) or fields.get("model_type") != "llama":
        raise ValueError(f'{path}: expected a LlamaConfig, with "model_type": "llama"')
    known = {*LlamaConfig().to_dict(), *SIZES, *NUMBERS, *TOKENS, *IRRELEVANT_FIELDS, *ROPE}
    for name, value in fields.items():
        suggestion = None if name in known else nearest(name, known)
        if suggestion:  # transformers keeps unknown fields without a word
            raise ValueError(f"{path}: unknown field {name!r}; did you mean {suggestion!r}?")
        requirement = _unmet_requirement(name, value)
        if requirement:
            raise ValueError(f"{path}: {name} is {value!r}; it must be {requirement}")
    try:
        config = LlamaConfig.from_dict(fields)
        smaller = copy.deepcopy(config)
        smaller.num_hidden_layers = 1
        with torch.device("meta"):  # layers check fields that the config does not
            LlamaForCausalLM(smaller)(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    except Exception as error:  # transformers raises errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: no Llama can be built from it: {reason}") from error
    return config


def _unmet_requirement(name: str, value: Any) -> str | None:
    """Return what a field of a LlamaConfig must be; None: it is."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_int or isinstance(value, float)
    if name in SIZES and not (is_int and value >= 1):
        return "a whole number, at least 1"
    if name in NUMBERS and not (is_number and 0 < value < math.inf):
        return "a number above 0"
    is_list_of_tokens = name == "eos_token_id" and isinstance(value, list) and value
    tokens = value if is_list_of_tokens else [value]
    if name in TOKENS and value is not None and not all(type(token) is int for token in tokens):
        return "a whole number, or null"
    if name == "attention_dropout" and not (is_number and 0 <= value <= 1):
        return "a number from 0 to 1"
    if name in ROPE and not (value is None or isinstance(value, dict)):
        return "an object, or null"
    if name == "hidden_act" and value not in list(ACT2FN):
        return f"one of {', '.join(ACT2FN)}"
    if name == "architectures" and value != ["LlamaForCausalLM"]:
        return '["LlamaForCausalLM"]'
    return None


def identity(config: Any) -> dict[str, Any]:
    """Return the fields of a LlamaConfig that affect training, and transformers' version; JSON."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in values.items() if name not in IRRELEVANT_FIELDS}


def drop_release_fields(
    saved: dict[str, Any], now: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make two identities comparable that two releases of transformers have written.

    Args:
        saved, now: returned by ``identity``.

    Returns:
        Both, without the version, and without the fields that one has only if versions differ.
    """
    release = "transformers_version"
    names = saved.keys() | now.keys()
    if saved.get(release) != now.get(release):
        names = saved.keys() & now.keys()
    names -= {release}
    saved, now = ({k: v for k, v in values.items() if k in names} for values in (saved, now))
    return saved, now


def build(
    config: Any, seed: int, init_context: AbstractContextManager[Any] | None = None
) -> nn.Module:
    """Build a float32 model with its initial weights.

    Args:
        config: a LlamaConfig.
        seed: of the weights.
        init_context: where to construct the model, for example deepspeed.zero.Init.
    """
    with init_context or nullcontext():
        model: nn.Module = LlamaForCausalLM(config)
    _set_weights(model, seed, config.initializer_range)
    return model


def build_empty(path: Path) -> nn.Module:
    """Build a causal language model of any architecture that transformers knows, without memory.

    Args:
        path: its config.json.

    Returns:
        The model on the meta device.

    Raises:
        ValueError: the file cannot be read, or no model can be built from it.
    """
    try:
        fields = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"cannot read the model {path}: {error}") from None
    # here, since the package imports transformers' Trainer, which training has no need of
    from spectral_dist.integrations.huggingface.empty import empty_model

    return empty_model(fields, path)


@torch.no_grad()
def _set_weights(model: nn.Module, seed: int, std: float) -> None:
    """Set the weights: matrices normal, norms 1.

    The numbers are the same with or without zero.Init, and on any device.
    """
    for name, parameter in model.named_parameters():
        # zero.Init leaves an empty tensor, with its shape in ds_shape.
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        values = initial(name, shape, seed, std)
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values)
        else:
            parameter.copy_(values)


def initial(name: str, shape: Sequence[int], seed: int, std: float) -> Tensor:
    """Return the initial values of a parameter, which depend on its name and the seed alone.

    Args:
        name: of the parameter.
        shape: of the whole parameter; a vector is all ones.
        seed, std: of the normal distribution.
    """
    if len(shape) < 2:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(_seed(seed, name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _seed(seed: int, name: str) -> int:
    """Return the seed of one parameter."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def shrink(model: Any, full: bool = False) -> tuple[Any, str]:
    """Copy a model's config with sizes that a CPU can step in seconds.

    It has two layers, and widths of at most 256: the doctor's checks are about the configuration,
    not about size.

    Args:
        model: a LlamaConfig.
        full: copy it as it is.

    Returns:
        The copy, and a note of what was reduced.
    """
    smaller = copy.deepcopy(model)
    if full:
        return smaller, "the model as it is"
    smaller.num_hidden_layers = min(model.num_hidden_layers, 2)
    smaller.vocab_size = min(model.vocab_size, 1024)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(getattr(smaller, token, None), int) and getattr(smaller, token) >= 1024:
            setattr(smaller, token, 0)
    factor = max(1, math.ceil(model.hidden_size / 256))
    heads = max(1, model.num_attention_heads // factor)
    groups = max(1, model.num_attention_heads // model.num_key_value_heads)
    smaller.num_key_value_heads = max(1, heads // groups)
    smaller.num_attention_heads = smaller.num_key_value_heads * groups
    smaller.head_dim = model.hidden_size // model.num_attention_heads
    smaller.hidden_size = smaller.num_attention_heads * smaller.head_dim
    smaller.intermediate_size = max(1, model.intermediate_size // factor)
    return smaller, (
        f"{smaller.num_hidden_layers} of {model.num_hidden_layers} layers, hidden"
        f" {smaller.hidden_size} of {model.hidden_size} (--full for all of it)"
    )
