"""Private names of DeepSpeed that say which ranks have which part of a model.

Stages of a PipelineModule, experts of deepspeed.moe, and the ranks that share sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from spectral_dist.integrations.deepspeed import _compat  # first: it checks the release

from deepspeed.moe.layer import MoE  # isort: skip
from deepspeed.moe.utils import is_moe_param_group  # isort: skip
from deepspeed.utils.groups import _get_expert_parallel_rank as expert_rank  # isort: skip


def shares_sequences(engine: Any) -> bool:
    """Return whether several ranks share each sequence (Ulysses)."""
    return bool(getattr(engine, "sequence_parallel_size", 1) > 1)


def splits_sequences_apart(engine: Any) -> bool:
    """Return whether ranks that share sequences are not among those that reduce gradients.

    False while the engine has no groups yet.
    """
    group = getattr(engine, "seq_parallel_group", None)
    if group is None:
        return False
    ranks, data_ranks = map(dist.get_process_group_ranks, (group, _compat.data_group(engine)))
    return not set(ranks) <= set(data_ranks)


def shard_group(engine: Any, group: Mapping[str, Any]) -> dist.ProcessGroup:
    """Return the ranks over which ZeRO partitions, or which have copies of, a parameter group."""
    if not is_moe_param_group(group):
        return _compat.data_group(engine)
    groups: dict[str, dist.ProcessGroup] = _compat.attribute(engine, "expert_data_parallel_group")
    return groups[group["name"]]


def expert_offsets(model: nn.Module) -> dict[str, int]:
    """Return {prefix of names of a layer's experts: in the whole layer, number of the first here}.

    Args:
        model: with layers of deepspeed.moe, whose process groups exist already.
    """
    offsets = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            rank = expert_rank(module.expert_group_name)
            prefix = f"{name}.deepspeed_moe.experts.deepspeed_experts."
            offsets[prefix.lstrip(".")] = rank * module.num_local_experts
    return offsets


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has layers of deepspeed.moe."""
    return any(isinstance(module, MoE) for module in model.modules())


def has_auto_experts(engine: Any) -> bool:
    """Return whether AutoEP has replaced layers of the model by experts of its own kind."""
    return bool(engine.has_moe_layers) and not has_experts(engine.module)


def pipe_group(engine: Any) -> dist.ProcessGroup | None:
    """Return the ranks that have the stages of one copy of a PipelineModule; None without one."""
    if not engine.pipeline_parallelism:
        return None
    group: dist.ProcessGroup = _compat.attribute(engine, "mpu").get_pipe_parallel_group()
    return group


def tied_layers(pipeline_module: nn.Module) -> dict[str, str]:
    """Return {prefix of parameters' names: key} of this stage's layers that other stages have."""
    tied = _compat.attribute(pipeline_module, "tied_comms")
    return {f"tied_modules.{k}.": k for k, entry in tied.items() if len(entry["ranks"]) > 1}
