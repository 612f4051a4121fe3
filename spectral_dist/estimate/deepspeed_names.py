"""The estimates that DeepSpeed's users know, by its names, with our optimizers' state in them.

DeepSpeed's functions of these names (deepspeed.runtime.zero) count 8 bytes a parameter for Adam's
moments. Here DeepSpeed's formulas are kept, but what the optimizer keeps is exact, on the rank that
keeps most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from spectral_dist._error_help import explained
from spectral_dist.estimate.estimate import Estimate, estimate
from spectral_dist.estimate.job import Job

GIB = 2**30


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    optimizer: str = "muon",
    **options: Any,
) -> None:
    """Print what ZeRO-2 takes on a GPU and on a node's CPUs, as DeepSpeed's function does.

    Args:
        model: with or without memory for its weights.
        num_gpus_per_node: GPUs of each node.
        num_nodes: the number of nodes.
        additional_buffer_factor: what CPU memory is multiplied by.
        optimizer: its name, as "muon".
        options: of the optimizer, by keyword.

    Raises:
        ValueError: as in ``estimate``.
    """
    _print(2, model, num_gpus_per_node, num_nodes, additional_buffer_factor, optimizer, options)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    optimizer: str = "muon",
    **options: Any,
) -> None:
    """Print what ZeRO-3 takes on a GPU and on a node's CPUs, as DeepSpeed's function does.

    Arguments and errors are those of ``estimate_zero2_model_states_mem_needs_all_live``.
    """
    _print(3, model, num_gpus_per_node, num_nodes, additional_buffer_factor, optimizer, options)


def estimate_zero2_model_states_mem_needs_all_cold(
    config: Any,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    optimizer: str = "muon",
    **options: Any,
) -> None:
    """Print what ZeRO-2 takes for a model that is not there.

    Where DeepSpeed's function takes ``total_params``, this one takes the model's config: what our
    optimizers keep and send depends on the shapes of matrices, and not on their sum.

    Args:
        config: of transformers: the object, its fields, or the path of a config.json.
        num_gpus_per_node, num_nodes, additional_buffer_factor, optimizer, options: as in
            ``estimate_zero2_model_states_mem_needs_all_live``.

    Raises:
        ValueError: as in ``estimate``, and for a config that no model can be built from.
    """
    model = _empty(config)
    _print(2, model, num_gpus_per_node, num_nodes, additional_buffer_factor, optimizer, options)


def estimate_zero3_model_states_mem_needs_all_cold(
    config: Any,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    optimizer: str = "muon",
    **options: Any,
) -> None:
    """Print what ZeRO-3 takes for a model that is not there.

    Where DeepSpeed's function takes ``total_params`` and ``largest_layer_params``, this one takes
    the model's config, as ``estimate_zero2_model_states_mem_needs_all_cold`` does.
    """
    model = _empty(config)
    _print(3, model, num_gpus_per_node, num_nodes, additional_buffer_factor, optimizer, options)


@explained
def _empty(config: Any) -> nn.Module:
    """Return the model of a config, without memory.

    Raises:
        ValueError: no config, or none that a model can be built from.
    """
    from spectral_dist.integrations.huggingface.empty import empty_model

    if isinstance(config, str | PathLike):
        try:
            fields = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the model {config}: {error}") from None
        return empty_model(fields, config)
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"config is {config!r:.60}; write the model's config, its fields or the path of its"
            " config.json: what these optimizers keep depends on shapes, so that a number of"
            " parameters does not tell it"
        )
    return empty_model(fields, "config")


@explained
def _print(
    stage: int, model: nn.Module, gpus: int, nodes: int, factor: float, optimizer: str,
    options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Print DeepSpeed's table for a stage."""
    job = Job.from_user(f"zero{stage}", nodes=nodes, gpus_per_node=gpus)
    result = estimate(model, job, optimizer, options)
    numel = sum(p.numel() for p in model.parameters())
    layers = (sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    largest = max(layers)
    hardware = f"{nodes} node{'s' * (nodes > 1)}, {gpus} GPU{'s' * (gpus > 1)} per node"
    size = f"{int(numel / 1e6)}M total params" + (
        f", {int(largest / 1e6)}M largest layer params" if stage == 3 else ""
    )
    lines = [
        "Estimated memory needed for params, optim states and gradients for a:",
        f"HW: Setup with {hardware}.",
        f"SW: Model with {size}; {optimizer} for its matrices.",
        "  per CPU  |  per GPU |   Options",
    ]
    for cpu, gpu, text in _rows(stage, result, numel, largest, gpus, nodes):
        lines.append(f" {cpu * factor / GIB:7.2f}GB | {gpu / GIB:6.2f}GB | {text}")
    temporary = int(result.by_rank["temporary"].max())
    lines.append(f"and while the optimizer steps, on a GPU: {temporary / GIB:.2f}GB (bucket_mb)")
    print("\n".join(lines))  # noqa: T201  as DeepSpeed's functions do


def _rows(
    stage: int, result: Estimate, numel: int, largest: int, gpus: int, nodes: int
) -> list[tuple[float, float, str]]:
    """Return (CPU bytes of a node before the factor, GPU bytes, options) of each line."""
    ranks, wide, half = gpus * nodes, 4, 2
    kept = result.by_rank["optimizer_state"] + result.by_rank["master_weights"]
    # of a rank, with the float32 gradients that it steps on; and of all ranks
    stepped = int(kept.max()) + wide * numel // ranks
    all_stepped = int(kept.sum()) + wide * numel
    if stage == 2:
        whole = half * numel
        offloaded = float(max(wide * numel * ranks, all_stepped))
        return [
            (offloaded, whole, "offload_optimizer=cpu "),
            (
                wide * numel * gpus,
                whole + half * numel // ranks + stepped,
                "offload_optimizer=none",
            ),
        ]
    gathered = 2 * half * largest
    rows: list[tuple[float, float, str]] = []
    for parameters, optimizer in (("cpu ", "cpu "), ("none", "cpu "), ("none", "none")):
        for zero_init in (1, 0):
            on_cpu = optimizer == "cpu "
            cpu = (all_stepped * on_cpu + half * numel * (parameters == "cpu ")) / nodes
            gpu = gathered + half * numel // ranks * (parameters == "none")
            gpu += 0 if on_cpu else stepped
            if not zero_init:
                cpu = max(wide * numel * gpus, cpu)
            elif not on_cpu:
                cpu = wide * largest * gpus
            text = (
                f"offload_param={parameters}, offload_optimizer={optimizer}, zero_init={zero_init}"
            )
            rows.append((float(cpu), gpu, text))
    return rows
