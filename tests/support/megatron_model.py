"""A small GPT of Megatron-core on the CPU, the same one however it is cut; for ranks.

Call ``megatron_cpu.install(version)`` and ``parallel(...)`` first. Weights depend on nothing but
their names, and the batch of a step on nothing but the step, so that losses and parameters under
any tensor, pipeline, expert and data parallelism are to be those of one process.
"""

from __future__ import annotations

import gc
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support import megatron_context, megatron_grouped

SEQUENCES = 8
LENGTH = 16
VOCABULARY = 128
_current: dict[str, Any] = {}
"""Megatron's groups in this process, and the sizes they are for: making them takes long."""


def parallel(
    tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, **options: Any
) -> tuple[int, int]:
    """Megatron's groups for these sizes, in place of any it has; (data rank, data size).

    Models and optimizers of before are done with: groups that stay cost the rank threads, and
    dozens of calls seconds each.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    asked = (tp, pp, ep, etp, tuple(sorted(options.items())))
    there = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    if there is None or _current != {"sizes": asked, "group": there}:
        if there is not None:
            parallel_state.destroy_model_parallel()
        gc.collect()  # optimizers in cycles keep groups, and groups threads
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        parallel_state.initialize_model_parallel(
            tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, **options
        )
        made = parallel_state.get_tensor_model_parallel_group()
        _current.update(sizes=asked, group=made)
    model_parallel_cuda_manual_seed(123, force_reset_rng=True)
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def gpt(
    *, swiglu: bool = True, heads: int = 4, query_groups: int | None = 2, hidden: int = 64,
    layers: int = 2, ffn: int = 96, vocab: int = VOCABULARY, bf16: bool = False, tied: bool = False,
    moe_experts: int | None = None, attention_output_gate: bool = False,
    sequence_parallel: bool = False, vp_stage: int | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """This rank's part of the model: rotary positions, no biases; options go to its config.

    ``vp_stage``: which of the parts it has, if several (interleaved pipeline stages).
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    settings: dict[str, Any] = {
        "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn,
        "num_attention_heads": heads, "num_query_groups": query_groups,
        "attention_output_gate": attention_output_gate, "sequence_parallel": sequence_parallel,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "bf16": bf16, "params_dtype": dtype, "pipeline_dtype": dtype,
        "use_cpu_initialization": True, "add_bias_linear": False, "normalization": "RMSNorm",
        "gated_linear_unit": swiglu, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "activation_func": nn.functional.silu if swiglu else nn.functional.gelu,
        "bias_activation_fusion": False, "bias_dropout_fusion": False, "apply_rope_fusion": False,
        "masked_softmax_fusion": False, "gradient_accumulation_fusion": False,
    }  # fmt: skip
    stage = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
    if stage:
        sizes = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        settings["virtual_pipeline_model_parallel_size"] = sizes
    if moe_experts:
        settings |= {
            "num_moe_experts": moe_experts, "moe_ffn_hidden_size": ffn, "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall",
        }  # fmt: skip
    spec = get_gpt_layer_local_spec(
        num_experts=moe_experts,
        qk_layernorm=options.get("qk_layernorm", False),
        normalization="RMSNorm",
    )
    if settings["context_parallel_size"] > 1:
        megatron_context.attend_over_ranks(spec)
    if options.get("moe_grouped_gemm"):
        megatron_grouped.group_experts(spec)
    model = GPTModel(
        TransformerConfig(**(settings | options)),
        spec,
        vocab_size=vocab,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        vp_stage=vp_stage,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            if parameter.ndim == 2:  # norms stay ones
                parameter.copy_(shard(weight(name, full_shape(parameter)), parameter))
    return model


def weight(name: str, shape: list[int]) -> Tensor:
    """The full matrix of that name: orthogonal, so that gradients are far from singular."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    gain = 5.0 if "word_embeddings" in name else 1.0
    return nn.init.orthogonal_(torch.empty(shape), gain, generator=generator)


def wrap(
    model: nn.Module, use_distributed_optimizer: bool = False, bucket_size: int | None = None,
    **options: Any,
) -> nn.Module:  # fmt: skip
    """Under Megatron's DistributedDataParallel; options go to its config.

    Megatron ignores ``bucket_size`` unless ``overlap_grad_reduce=True`` is among them.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    config: Any = model.config
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer, bucket_size=bucket_size, **options
    )
    if config.bf16:
        model = Float16Module(config, model)
    return DistributedDataParallel(config, settings, model)


def optimizer_config(ddp: Any, optimizer: str = "adam", **options: Any) -> Any:
    """An OptimizerConfig that agrees with the model and how it is wrapped."""
    from megatron.core.optimizer import OptimizerConfig

    ddp = chunks_of(ddp)[0]
    settings: dict[str, Any] = {
        "optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1, "bf16": ddp.config.bf16,
        "params_dtype": ddp.config.params_dtype, "clip_grad": 1.0,
        "use_distributed_optimizer": ddp.ddp_config.use_distributed_optimizer,
        "overlap_param_gather": ddp.ddp_config.overlap_param_gather,
    }  # fmt: skip
    return OptimizerConfig(**(settings | options))


def batch(step: int, dp_rank: int, dp_size: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels): this data rank's part of a global batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    mine = text.chunk(dp_size)[dp_rank]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def train_step(ddp: Any, optimizer: Any, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """One step as Megatron's own loop does it; (mean loss of the global batch, gradient norm).

    Several chunks (virtual stages) take as many micro-batches as there are pipeline stages, as
    Megatron's interleaved schedule needs. Context-parallel ranks take their parts of sequences.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parts = parallel_state.get_context_parallel_world_size()

    def forward(iterator: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
        tokens, labels = (megatron_context.part(text) for text in next(iterator))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = model(tokens, positions, None, labels=labels)

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """Over the whole sequences; Megatron multiplies it by the number of their parts."""
            loss = losses.mean() / parts
            return loss, {"loss": loss.detach().clone()}

        return output, mean

    models = chunks_of(ddp)
    for chunk in models:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    number = parallel_state.get_pipeline_model_parallel_world_size() if len(models) > 1 else 1
    pieces = list(zip(*(text.chunk(number) for text in data), strict=True))
    iterators = [iter(pieces) for _ in models]
    found = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iterators if len(models) > 1 else iterators[0],
        model=models, num_microbatches=number, seq_length=LENGTH,
        micro_batch_size=len(pieces[0][0]), forward_only=False,
    )  # fmt: skip
    loss = torch.zeros((), dtype=torch.float64)
    for one in found:
        loss += one["loss"].double() / number
    data_size = parallel_state.get_data_parallel_world_size()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    dist.all_reduce(loss)  # every rank of the last stage has its data rank's
    _, norm, _ = optimizer.step()
    return float(loss) / (data_size * tp_size), float(norm)


def chunks_of(ddp: Any) -> list[Any]:
    """This rank's parts of the model: several with virtual pipeline stages."""
    return list(ddp) if isinstance(ddp, list) else [ddp]


def gpt_of(model: Any) -> Any:
    """The GPTModel under its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def named_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the whole model, this rank's part): layers, experts by their global numbers."""
    from megatron.core import parallel_state

    if isinstance(model, list):
        for chunk in model:
            yield from named_parameters(chunk)
        return
    model = gpt_of(model)
    first = model.decoder.layers[0].layer_number - 1
    for name, parameter in model.named_parameters():
        name = re.sub(r"layers\.(\d+)", lambda m: f"layers.{first + int(m[1])}", name)
        if ".experts." in name:
            local = model.config.num_moe_experts // model.config.expert_model_parallel_size
            start = parallel_state.get_expert_model_parallel_rank() * local
            # TEGroupedMLP has linear_fc1.weight3 for local_experts.3.linear_fc1.weight
            name = re.sub(
                r"\.experts\.(linear_fc\d\.weight)(\d+)", r".experts.local_experts.\2.\1", name
            )
            name = re.sub(r"local_experts\.(\d+)", lambda m: f"experts.{start + int(m[1])}", name)  # noqa: B023
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the last stage's copy
        yield name, parameter


def cut(parameter: Tensor) -> tuple[Any, int, int]:
    """(group that it is cut over or None, dimension, number of blocks each cut by itself)."""
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return None, 0, 1
    if getattr(parameter, "allreduce", True):
        group = parallel_state.get_tensor_model_parallel_group()
    else:
        group = parallel_state.get_expert_tensor_parallel_group()
    blocks = 2 if hasattr(parameter, "gate_and_up") else parameter.partition_stride
    return group, parameter.partition_dim, blocks


def full_shape(parameter: Tensor) -> list[int]:
    group, dimension, _ = cut(parameter)
    shape = list(parameter.shape)
    if group is not None:
        shape[dimension] *= group.size()
    return shape


def shard(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a full tensor."""
    group, dimension, blocks = cut(parameter)
    if group is None:
        return full
    parts = full.chunk(blocks, dimension)
    return torch.cat([p.chunk(group.size(), dimension)[group.rank()] for p in parts], dimension)


def gathered(local: Tensor, parameter: Tensor) -> Tensor:
    """The full tensor of which ``local``, shaped like the parameter, is this rank's part."""
    group, dimension, blocks = cut(parameter)
    if group is None or group.size() == 1:
        return local.detach().clone()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.detach().contiguous(), group=group)
    pieces = [part.chunk(blocks, dimension) for part in parts]
    return torch.cat([piece[b] for b in range(blocks) for piece in pieces], dimension)


def full_parameters(model: Any) -> dict[str, Tensor]:
    """Every parameter of the whole model, [gate; up] for SwiGLU, the same on every rank.

    Copies, over data ranks, of norms over tensor ranks, of tied embeddings, must be the same bits.
    """
    for chunk in chunks_of(model):
        if hasattr(chunk, "ddp_config") and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # else done by the next forward
    mine = {name: gathered(p.data, p) for name, p in named_parameters(model)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    merged: dict[str, Tensor] = {}
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            first = merged.setdefault(name, value)
            assert torch.equal(first, value), f"rank {rank} has another {name}"
    return merged
