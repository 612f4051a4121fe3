"""Checks that refuse Megatron configurations which are not supported; options that it sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spectral_dist._errors import suggest
from spectral_dist.integrations.megatron import _compat
from spectral_dist.rules.options import ROUTING

MEGATRON_SETTINGS = {
    "lr": ("lr", "--lr"),
    "weight_decay": ("weight_decay", "--weight-decay"),
    "betas": ("adam_beta1, adam_beta2", "--adam-beta1, --adam-beta2"),
    "eps": ("adam_eps", "--adam-eps"),
}
"""Options of ours that are Megatron's own: name -> (settings of OptimizerConfig, flags)."""


def spectral_options(
    config: Any, options: Mapping[str, Any], name: str, known: Iterable[str]
) -> dict[str, Any]:
    """Return our optimizer's options, completed by those that Megatron's configuration sets.

    Args:
        config: Megatron's OptimizerConfig.
        options: those that a user has given for ours.
        name: of our optimizer, for messages.
        known: the names of all options that it has.

    Raises:
        ValueError: an option is unknown, is Megatron's to set, or would have no effect.
    """
    for option, (setting, flag) in MEGATRON_SETTINGS.items():
        if option in options:
            raise ValueError(
                f"{option} is Megatron's own setting; write it as OptimizerConfig({setting}=...),"
                f" or {flag}"
            )
    if options.get("scalar_weight_decay") is not None:
        raise ValueError(
            "scalar_weight_decay has no effect under Megatron, whose scheduler writes the decay of"
            " every group; override wd_mult of the parameters in config_overrides"
        )
    valid = {*known, *ROUTING} - MEGATRON_SETTINGS.keys() - {"scalar_weight_decay"}
    for option in options:
        if option not in valid | {"scalar_weight_decay"}:  # checked above to be None
            raise ValueError(f"{name}: unknown option {option!r}{suggest(option, valid)}")
    if config.lr is None:
        raise ValueError("OptimizerConfig has no lr; write lr=..., or --lr")
    return {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        **options,
    }


def refuse(config: Any, chunks: Sequence[nn.Module]) -> None:
    """Raise if a configuration stores or steps parameters in a way that ours does not support.

    Raises:
        ValueError: names the setting, the reason and what works instead.
    """
    if any(_compat.is_torch_fsdp(chunk) for chunk in chunks):
        raise ValueError(
            "spectral optimizers do not support use_torch_fsdp2 (--use-torch-fsdp2) under Megatron,"
            " whose weights are DTensors, which this integration does not read: write"
            " --use-distributed-optimizer in its place, or use plain torch's fully_shard with"
            " spectral_dist.Muon(spectral_dist.param_groups(model))"
        )
    ddp: Any = getattr(chunks[0], "ddp_config", None)
    if ddp is None:
        raise ValueError(
            "model_chunks must be wrapped by megatron.core.distributed.DistributedDataParallel"
        )

    def has(name: str) -> Any:
        return getattr(config, name, None)

    model: Any = getattr(chunks[0], "config", None)
    quantized = [
        setting
        for owner, setting in ((ddp, "fp8_param_gather"), (ddp, "fp4_param_gather"),
                               (model, "fp8_param"), (model, "fp4_param"))
        if getattr(owner, setting, False)
    ]  # fmt: skip
    other_dtypes = [
        f"{setting}={getattr(config, setting)}"
        for setting in ("main_params_dtype", "main_grads_dtype", "exp_avg_dtype",
                        "exp_avg_sq_dtype")
        if getattr(config, setting, torch.float32) != torch.float32
    ]  # fmt: skip
    cases: list[tuple[Any, str, str]] = [
        (has("optimizer_cpu_offload"), "optimizer_cpu_offload (--optimizer-cpu-offload), which runs"
         " Megatron's own HybridDeviceOptimizer, of Adam, where ours has to run", "leave it off"),
        (has("use_precision_aware_optimizer"), "use_precision_aware_optimizer"
         " (--use-precision-aware-optimizer), which leaves master weights to TransformerEngine's"
         " Adam", "leave it off"),
        (other_dtypes, f"{', '.join(other_dtypes)}, since momentum, masters and their gradients are"
         " float32", "leave it at torch.float32"),
        (has("optimizer_cuda_graph"), "optimizer_cuda_graph", "leave it off"),
        (has("use_layer_wise_distributed_optimizer"), "use_layer_wise_distributed_optimizer",
         "use use_distributed_optimizer: ours takes whole matrices from its ranges"),
        (not getattr(config, "decoupled_weight_decay", True), "decoupled_weight_decay=False",
         "use decoupled decay"),
        (getattr(ddp, "use_megatron_fsdp", False), "use_megatron_fsdp (--use-megatron-fsdp), which"
         " gives each rank rows of a weight that neither torch's DTensor nor Megatron's ranges"
         " describe", "write --use-distributed-optimizer in its place, or use plain torch's"
         " fully_shard with spectral_dist.Muon(spectral_dist.param_groups(model))"),
        (getattr(ddp, "num_distributed_optimizer_instances", 1) > 1,
         "num_distributed_optimizer_instances above 1", "set it to 1"),
        (getattr(model, "use_mup", False), "use_mup (--use-mup), which divides matrices' lr by the"
         " width multiplier, as Adam's steps need and orthogonalized ones do not",
         "leave it off, and write scale='spectral' (--spectral-scale spectral), whose steps are"
         " of one size whatever the width"),
        (_compat.rematerializes(), "weights cut for rematerialization (generalized tensor"
         " parallelism)", "leave it off"),
        (getattr(model, "moe_single_grouped_weight", False), "moe_single_grouped_weight, which"
         " packs all experts into one weight", "leave it off, and each expert has its own"),
        (quantized, f"{', '.join(quantized)}, which leaves no weights but quantized ones on a"
         " rank", "leave it off: products are in --fp8-format or --fp4-format without it, too"),
    ]  # fmt: skip
    for applies, setting, fix in cases:
        if applies:
            raise ValueError(f"spectral optimizers do not support {setting} under Megatron: {fix}")


def refuse_overrides(overrides: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raise if Megatron's ``config_overrides`` choose an optimizer for some parameters.

    Raises:
        ValueError: names the key, and what to write.
    """
    for override in overrides.values():
        if "optimizer" in override:
            raise ValueError(
                f"config_overrides has optimizer={override['optimizer']!r} for some parameters,"
                " but which of them are orthogonalized is said by patterns: write"
                " scalars=[...] (--spectral-scalars) for those on AdamW, or matrices=[...]"
            )


def refuse_adaptation(options: Mapping[str, Any], chunks: Sequence[nn.Module]) -> None:
    """Raise if ROOT would adapt its coefficients to spectra of a part of the model only.

    Args:
        options: ours.
        chunks: this rank's parts of the model.

    Raises:
        ValueError: names the parallel size that splits the model's matrices among ranks.
    """
    model: Any = getattr(chunks[0], "config", None)
    for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
        if options.get("adapt_every") and getattr(model, name, 1) > 1:
            raise ValueError(
                f"adapt_every is {options['adapt_every']}, but {name} is {getattr(model, name)}:"
                " each stage would fit coefficients of its own; write adapt_every=0 and"
                " coefficients of `spectral-dist calibrate`"
            )


def check_marks(
    chunks: Sequence[nn.Module],
    tensor_size: int,
    expert_size: int,
    expert_tensor_size: int,
    on_any_stage: Callable[[list[bool]], list[bool]],
) -> None:
    """Raise if the model is cut, but no attribute says so: tiles would count as whole matrices.

    A collective call, as ``on_any_stage`` is: all ranks raise, or none.

    Args:
        chunks: this rank's parts of the model.
        tensor_size: the number of tensor-parallel ranks of dense parameters.
        expert_size: the number of ranks over which experts are distributed.
        expert_tensor_size: the number of tensor-parallel ranks of an expert.
        on_any_stage: returns, for each flag, whether it is set on any pipeline stage.

    Raises:
        ValueError: the attributes of parameters are not those of a known version.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    config: Any = getattr(chunks[0], "config", None)
    has_cut, has_experts, has_unmarked_heads = on_any_stage(
        [
            any(_compat.cut_dimension(p) is not None for p in parameters),
            any(_compat.is_expert(p) for p in parameters),
            _compat.unmarked_heads(chunks),
        ]
    )
    unknown = (
        f"the attributes of its parameters are not those of a known megatron-core"
        f" ({_compat.KNOWN}), so {{}}; build it of megatron.core's layers, or mark your own as they"
        " do"
    )
    if tensor_size > 1 and not has_cut:
        raise ValueError(
            f"tensor_model_parallel_size is {tensor_size}, but no parameter of the model is marked"
            " as cut (tensor_model_parallel, partition_dim): "
            + unknown.format("its tiles would be taken for whole matrices")
        )
    lacks_experts = getattr(config, "num_moe_experts", None) and not has_experts
    if lacks_experts and expert_size == 1 and expert_tensor_size != tensor_size:
        raise ValueError(
            "spectral optimizers do not support expert_tensor_parallel_size"
            f" {expert_tensor_size} beside tensor_model_parallel_size {tensor_size} without expert"
            " parallelism under this Megatron, which marks no parameter as an expert's then: make"
            " them equal, or install megatron-core 0.19.2"
        )
    if lacks_experts and expert_size > 1:
        raise ValueError(
            f"expert_model_parallel_size is {expert_size}, but no parameter of the model is marked"
            " as an expert's (allreduce=False): "
            + unknown.format("experts would be taken for copies of each other")
        )
    if has_unmarked_heads:
        raise ValueError(
            "the model has an embedding or an output layer, but no parameter is marked as one"
            " (is_embedding_or_output_parameter): "
            + unknown.format("it would be orthogonalized as hidden layers are")
        )
