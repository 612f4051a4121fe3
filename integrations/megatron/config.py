"""What of Megatron's configuration is not supported, and which options are Megatron's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from spectral_dist._errors import suggest
from spectral_dist.integrations.megatron import _compat
from spectral_dist.rules.options import ROUTING

OWN = {
    "lr": ("lr", "--lr"),
    "weight_decay": ("weight_decay", "--weight-decay"),
    "betas": ("adam_beta1, adam_beta2", "--adam-beta1, --adam-beta2"),
    "eps": ("adam_eps", "--adam-eps"),
}
"""Options of ours that Megatron has already: (settings of OptimizerConfig, flags)."""


def spectral_options(
    config: Any, given: Mapping[str, Any], name: str, known: Iterable[str]
) -> dict[str, Any]:
    """Our options, with those that Megatron's configuration decides.

    Args:
        config: Megatron's OptimizerConfig.
        given: options of ours.
        name: of the optimizer.
        known: the options that it has.

    Raises:
        ValueError: one is unknown, is given beside Megatron's own, or cannot be kept.
    """
    for option, (setting, flag) in OWN.items():
        if option in given:
            raise ValueError(
                f"{option} is Megatron's own setting; write it as OptimizerConfig({setting}=...),"
                f" or {flag}"
            )
    if given.get("scalar_weight_decay") is not None:
        raise ValueError(
            "scalar_weight_decay has no effect under Megatron, whose scheduler writes the decay of"
            " every group; override wd_mult of the parameters in config_overrides"
        )
    here = {*known, *ROUTING} - OWN.keys() - {"scalar_weight_decay"}
    for option in given:
        if option not in here | {"scalar_weight_decay"}:  # None, which says nothing
            raise ValueError(f"{name}: unknown option {option!r}{suggest(option, here)}")
    if config.lr is None:
        raise ValueError("OptimizerConfig has no lr; write lr=..., or --lr")
    return {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        **given,
    }


def refuse(config: Any, chunks: Sequence[nn.Module]) -> None:
    """Raise for every configuration whose parameters do not lie as the placer reads them.

    Raises:
        ValueError: names the setting, the reason and what works instead.
    """
    if any(_compat.is_torch_fsdp(chunk) for chunk in chunks):
        raise ValueError(
            "spectral optimizers do not support use_torch_fsdp2 (--use-torch-fsdp2) under Megatron:"
            " write --use-distributed-optimizer in its place, or use plain torch's fully_shard with"
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
    expert_tensor = getattr(model, "expert_tensor_parallel_size", None)
    tensor = getattr(model, "tensor_model_parallel_size", 1)
    apart = (
        getattr(model, "num_moe_experts", None)
        and getattr(model, "expert_model_parallel_size", 1) == 1
        and expert_tensor not in (None, tensor)
    )

    cases: list[tuple[Any, str, str]] = [
        (has("optimizer_cpu_offload"), "optimizer_cpu_offload, which runs Megatron's own Adam",
         "leave it off"),
        (has("use_precision_aware_optimizer"), "use_precision_aware_optimizer, which leaves master"
         " weights to TransformerEngine's Adam", "leave it off"),
        (has("optimizer_cuda_graph"), "optimizer_cuda_graph", "leave it off"),
        (has("use_layer_wise_distributed_optimizer"), "use_layer_wise_distributed_optimizer",
         "use use_distributed_optimizer: ours takes whole matrices from its ranges"),
        (not getattr(config, "decoupled_weight_decay", True), "decoupled_weight_decay=False",
         "use decoupled decay"),
        (getattr(ddp, "use_megatron_fsdp", False), "use_megatron_fsdp",
         "use use_distributed_optimizer, or plain torch's fully_shard"),
        (getattr(ddp, "num_distributed_optimizer_instances", 1) > 1,
         "num_distributed_optimizer_instances above 1", "set it to 1"),
        (getattr(model, "use_mup", False), "use_mup (--use-mup), which divides matrices' lr by the"
         " width multiplier, as Adam's steps need and orthogonalized ones do not",
         "leave it off, and write scale='spectral' (--spectral-scale spectral), whose steps are"
         " of one size whatever the width"),
        (_compat.rematerializes(), "weights cut for rematerialization (generalized tensor"
         " parallelism)", "leave it off"),
        (apart, f"expert_tensor_parallel_size {expert_tensor} beside"
         f" tensor_model_parallel_size {tensor} without expert parallelism", "make them equal"),
        (getattr(ddp, "fp8_param_gather", False), "fp8_param_gather", "leave it off"),
    ]  # fmt: skip
    for found, what, instead in cases:
        if found:
            raise ValueError(f"spectral optimizers do not support {what} under Megatron: {instead}")


def refuse_overrides(overrides: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raise if ``config_overrides`` names an optimizer for some parameters.

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


def refuse_adapting(given: Mapping[str, Any], chunks: Sequence[nn.Module]) -> None:
    """Raise if ROOT's coefficients would be adapted to spectra that not all ranks see.

    Raises:
        ValueError: names the setting.
    """
    model: Any = getattr(chunks[0], "config", None)
    for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
        if given.get("adapt_every") and getattr(model, name, 1) > 1:
            raise ValueError(
                f"adapt_every is {given['adapt_every']}, but {name} is {getattr(model, name)}: each"
                " stage would fit coefficients of its own; write adapt_every=0 and coefficients of"
                " `spectral-dist calibrate`"
            )


def check_marks(
    chunks: Sequence[nn.Module],
    tensor: int,
    expert: int,
    anywhere: Callable[[list[bool]], list[bool]],
) -> None:
    """Raise if the model is cut, but nothing in it says so: tiles would count as whole matrices.

    A collective call, as ``anywhere`` is: all ranks raise, or none.

    Args:
        chunks: this rank's parts of the model.
        tensor: tensor-parallel ranks of dense parameters.
        expert: ranks that experts are spread over.
        anywhere: returns what is true on any pipeline stage of what is on this one.

    Raises:
        ValueError: the marks on parameters are not those of a known version.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    config: Any = getattr(chunks[0], "config", None)
    cut, apart, unmarked = anywhere(
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
    if tensor > 1 and not cut:
        raise ValueError(
            f"tensor_model_parallel_size is {tensor}, but no parameter of the model is marked as"
            " cut (tensor_model_parallel, partition_dim): "
            + unknown.format("its tiles would be taken for whole matrices")
        )
    if expert > 1 and getattr(config, "num_moe_experts", None) and not apart:
        raise ValueError(
            f"expert_model_parallel_size is {expert}, but no parameter of the model is marked as an"
            " expert's (allreduce=False): "
            + unknown.format("experts would be taken for copies of each other")
        )
    if unmarked:
        raise ValueError(
            "the model has an embedding or an output layer, but no parameter is marked as one"
            " (is_embedding_or_output_parameter): "
            + unknown.format("it would be orthogonalized as hidden layers are")
        )
