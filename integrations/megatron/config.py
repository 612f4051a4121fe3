"""What of Megatron's configuration is not supported, and which options are Megatron's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from torch import nn

OWN = {
    "lr": ("lr", "--lr"),
    "weight_decay": ("weight_decay", "--weight-decay"),
    "betas": ("adam_beta1, adam_beta2", "--adam-beta1, --adam-beta2"),
    "eps": ("adam_eps", "--adam-eps"),
}
"""Options of ours that Megatron has already: (settings of OptimizerConfig, flags)."""


def spectral_options(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Our options, with those that Megatron's configuration decides.

    Raises:
        ValueError: one of these is given beside it, or cannot be kept.
    """
    for name, (setting, flag) in OWN.items():
        if name in given:
            raise ValueError(
                f"{name} is Megatron's own setting; write it as OptimizerConfig({setting}=...), or"
                f" {flag}"
            )
    if given.get("scalar_weight_decay") is not None:
        raise ValueError(
            "scalar_weight_decay has no effect under Megatron, whose scheduler writes the decay of"
            " every group; override wd_mult of the parameters in config_overrides"
        )
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
        (_rematerialized(), "weights cut for rematerialization (generalized tensor parallelism)",
         "leave it off"),
        (apart, f"expert_tensor_parallel_size {expert_tensor} beside"
         f" tensor_model_parallel_size {tensor} without expert parallelism", "make them equal"),
        (getattr(ddp, "fp8_param_gather", False), "fp8_param_gather", "leave it off"),
    ]  # fmt: skip
    for found, what, instead in cases:
        if found:
            raise ValueError(f"spectral optimizers do not support {what} under Megatron: {instead}")


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


def _rematerialized() -> bool:
    """Whether megatron-core (from 0.19 on) keeps weights in shards of yet another group."""
    get = getattr(parallel_state, "get_gtp_weight_remat_group", None)
    group = get(check_initialized=False) if get else None
    return group is not None and group.size() > 1
