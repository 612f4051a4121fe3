"""Build a Llama as megatron-core's GPTModel, with the initial weights that llama.build gives it."""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from spectral_dist.launch import llama
from spectral_dist.launch.megatron_config import MegatronConfig


def layers(config: MegatronConfig) -> str:
    """Describe, for the log, whose layers ``build`` uses."""
    if config.rotates:
        return "Megatron's local ones, rotated"
    if HAVE_TE:
        return "Transformer Engine's"
    return "Megatron's local ones (no Transformer Engine here)"


def build(model: Any, config: MegatronConfig, seed: int, device: torch.device) -> Any:
    """Build this rank's tiles of a model, in float32.

    Args:
        model: a LlamaConfig.
        config: the content of the YAML.
        seed: of the initial weights.
        device: where to put the model.

    Raises:
        ValueError: Megatron-core cannot build it.
    """
    config.check_model(model)
    if HAVE_TE and not config.rotates:
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    try:
        built = GPTModel(
            _transformer(model, config),
            spec,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_parameters["rope_theta"],
            share_embeddings_and_output_weights=model.tie_word_embeddings,
        )
    except AssertionError as error:
        if not config.sequence_parallel or (HAVE_TE and not config.rotates):
            raise
        what = f"{config.kind} has none" if config.rotates else "install Transformer Engine"
        raise config.fail("sequence_parallel", f"{what}: {error}") from None
    _set_weights(built, model, seed)
    return built.to(device)


def _transformer(model: Any, config: MegatronConfig) -> TransformerConfig:
    """Return Megatron's own configuration of the model."""
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.initializer_range,
        tensor_model_parallel_size=config.tensor_parallel,
        sequence_parallel=config.sequence_parallel,
        bf16=config.dtype == "bfloat16",
        params_dtype=getattr(torch, config.dtype),
        pipeline_dtype=getattr(torch, config.dtype),
        masked_softmax_fusion=False,  # a kernel of apex
    )


@torch.no_grad()
def _set_weights(built: Any, model: Any, seed: int) -> None:
    """Set this rank's tiles of the weights that llama.build would give a LlamaForCausalLM."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    head, hidden, mlp_size = model.head_dim, model.hidden_size, model.intermediate_size
    queries, keys = head * model.num_attention_heads, head * model.num_key_value_heads

    def full_weight(name: str, rows: int, columns: int) -> Tensor:
        return llama.initial(f"{name}.weight", (rows, columns), seed, model.initializer_range)

    def tile(matrix: Tensor, dim: int = 0) -> Tensor:
        tile_of_rank: Tensor = matrix.chunk(ranks, dim)[rank]
        return tile_of_rank

    def values(name: str) -> Tensor:
        if name.startswith("embedding.word_embeddings."):
            return tile(full_weight("model.embed_tokens", model.vocab_size, hidden))
        if name.startswith("output_layer."):
            return tile(full_weight("lm_head", model.vocab_size, hidden))
        match = re.fullmatch(r"decoder\.(layers\.\d+)\.(?:self_attention|mlp)\.(\w+)\.weight", name)
        assert match, name
        attention, mlp = f"model.{match[1]}.self_attn.", f"model.{match[1]}.mlp."
        if match[2] == "linear_qkv":  # by query groups: [the group's queries; its key; its value]
            sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
            parts = [full_weight(attention + part, rows, hidden) for part, rows in sizes.items()]
            groups = [part.view(model.num_key_value_heads, -1, hidden) for part in parts]
            return tile(torch.cat(groups, 1).flatten(0, 1))
        if match[2] == "linear_proj":
            return tile(full_weight(attention + "o_proj", hidden, queries), 1)
        if match[2] == "linear_fc1":  # each rank: [its gate; its up]
            gate_and_up = [
                full_weight(mlp + part, mlp_size, hidden) for part in ("gate_proj", "up_proj")
            ]
            return torch.cat([tile(part) for part in gate_and_up])
        assert match[2] == "linear_fc2", name
        return tile(full_weight(mlp + "down_proj", hidden, mlp_size), 1)

    for name, parameter in built.named_parameters():
        parameter.copy_(torch.ones(parameter.shape) if parameter.ndim < 2 else values(name))
