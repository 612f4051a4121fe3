"""What a real run of Megatron keeps, sends and computes on a rank; called by the harness."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from spectral_dist.rules import registry
from tests.support import estimates
from tests.support import megatron_model as models

COMMON: dict[str, Any] = {
    "hidden_size": 60, "head_dim": 14, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 92, "vocab_size": models.VOCABULARY,
    "tie_word_embeddings": False, "max_position_embeddings": models.LENGTH,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama"},
    "tied": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {**COMMON, "model_type": "qwen2"},
    "qwen3": {**COMMON, "model_type": "qwen3"},
    "mixtral": {**COMMON, "model_type": "mixtral", "num_local_experts": 4,
                "num_experts_per_tok": 2},
    "qwen3_moe": {**COMMON, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 92},
}  # fmt: skip


def gpt(name: str, **options: Any) -> Any:
    """This rank's part of Megatron's model of one of ``MODELS``."""
    fields = MODELS[name]
    family, experts = fields["model_type"], fields.get("num_local_experts", 0)
    experts = experts or fields.get("num_experts")
    from megatron.core import parallel_state

    is_cut = parallel_state.get_tensor_model_parallel_world_size() > 1
    return models.gpt(
        hidden=fields["hidden_size"], heads=fields["num_attention_heads"],
        query_groups=fields["num_key_value_heads"], layers=fields["num_hidden_layers"],
        ffn=fields["intermediate_size"], kv_channels=fields["head_dim"],
        tied=fields["tie_word_embeddings"],
        moe_experts=experts, sequence_parallel=bool(experts) and is_cut,  # Megatron wants it so
        add_qkv_bias=family == "qwen2", qk_layernorm=family.startswith("qwen3"), **options,
    )  # fmt: skip


def names_and_shapes(version: str, name: str) -> list[tuple[str, list[int]]]:
    """The parameters of Megatron's model in one process."""
    from tests.support import megatron_cpu

    megatron_cpu.install(version)
    models.parallel()
    return [(n, list(p.shape)) for n, p in gpt(name).named_parameters()]


def measure(
    version: str,
    model: str,
    cases: Sequence[tuple[str, Mapping[str, Any]]],
    sizes: Mapping[str, int],
    wrapping: Mapping[str, Any],
    dtype: str = "float32",
) -> list[dict[str, int]]:
    """Return what this rank has in each case (optimizer, options)."""
    from tests.support import megatron_cpu

    megatron_cpu.install(version)
    data = models.parallel(**sizes)
    return [_measure(model, *case, data, wrapping, dtype) for case in cases]


def _measure(
    name: str,
    optimizer: str,
    options: Mapping[str, Any],
    data: tuple[int, int],
    wrapping: Mapping[str, Any],
    dtype: str,
) -> dict[str, int]:
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    is_half = dtype == "bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"grad_reduce_in_fp32": True} if is_half else {}
        ddp: Any = models.wrap(gpt(name, bf16=is_half), **wrapping, **more)
        settings = models.optimizer_config(ddp, registry.find(optimizer).megatron_name)
        built = get_spectral_megatron_optimizer(settings, [ddp], **options)
        inner = [leaf.optimizer for leaf in getattr(built, "chained_optimizers", [built])]
        peaks = [estimates.Watch(one) for one in inner]
        sent = calls = 0
        for step in range(estimates.STEPS):
            sent, calls = (sum(getattr(o, k) for o in inner) for k in ("comm_bytes", "polar_calls"))
            for peak in peaks:
                peak.bytes = 0
            models.train_step(ddp, built, models.batch(step, *data))
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    is_flat = wrapping.get("use_distributed_optimizer", False)
    held = [b.param_data for b in buffers] if is_flat else list(ddp.parameters())
    stepped = [p for one in inner for group in one.param_groups for p in group["params"]]
    return {
        "optimizer_state": sum(map(estimates.state_bytes, inner)),
        "moved": sum(o.comm_bytes for o in inner) - sent,
        "polar_calls": sum(o.polar_calls for o in inner) - calls,
        "temporary": max(peak.bytes for peak in peaks),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "parameters": sum(tensor.nbytes for tensor in held),
        "master_weights": sum(p.nbytes for p in stepped) if is_half else 0,
        "team": max((t for one in inner for t in estimates.teams(one)), default=1),
    }
