"""Which parameters of a Megatron model are matrices, and which of them hold several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron._compat import cut_dimension, is_expert
from spectral_dist.integrations.megatron.ranks import MegatronRanks
from spectral_dist.params.modules import NORMS
from spectral_dist.params.spec import Inspector, ParamInfo
from spectral_dist.params.splits import Split

GATE_AND_UP = 2
"""The number of matrices in a gated layer's first weight: gate above up."""


class MegatronReader:
    """Reads parameters by the attributes that Megatron sets on them, and by their modules.

    Args:
        ranks: those that hold the dense parameters.
        expert_ranks: those that hold the experts.
        names: the name in the whole model of each parameter, by its id.
    """

    def __init__(
        self, ranks: MegatronRanks, expert_ranks: MegatronRanks, names: Mapping[int, str]
    ) -> None:
        self.ranks, self.expert_ranks, self.names = ranks, expert_ranks, names
        self._gated: set[int] = set()

    def __call__(self, model: nn.Module) -> Inspector:
        """Return a function that says what each parameter of the model is."""
        splits = fused_splits(model)
        self._gated |= {key for key, split in splits.items() if split == GATE_AND_UP}

        def read(name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
            shape = self._full_shape(parameter)
            kind, reason = _kind_and_reason(name, parameter, module, len(shape))
            split, global_name = splits.get(id(parameter)), self.names[id(parameter)]
            # the last part of a query group is its one head of v
            heads = (split[-1],) * len(split) if isinstance(split, list) else ()
            return ParamInfo(shape, kind, reason, split=split, heads=heads, name=global_name)

        return read

    def ranks_of(self, parameter: nn.Parameter) -> MegatronRanks:
        """Return the ranks that hold a parameter, or shards of it."""
        return self.expert_ranks if is_expert(parameter) else self.ranks

    def stride(self, parameter: nn.Parameter) -> int:
        """Return the number of parts of the cut dimension that each rank stores a piece of.

        Gate and up in one weight are two parts: a rank stores its rows of gate, then those of up.
        """
        if id(parameter) in self._gated:
            return GATE_AND_UP  # grouped experts' weights say 1
        return _compat.stride(parameter)

    def _full_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the shape of the whole parameter, which tensor parallelism may have cut."""
        shape, dim = list(parameter.shape), cut_dimension(parameter)
        if dim is not None:
            shape[dim] *= self.ranks_of(parameter).tensor_size
        return tuple(shape)


def _kind_and_reason(name: str, parameter: Any, module: nn.Module, ndim: int) -> tuple[str, str]:
    """Return a parameter's kind, "matrix" or "scalar", and the reason for it.

    Raises:
        ValueError: a weight that packs matrices in a way that is not supported.
    """
    module_type = type(module).__name__
    if ndim != 2:
        return "scalar", f"{ndim}-D"
    if _compat.is_embedding_or_output(parameter):
        return "scalar", "embedding or output head"
    if isinstance(module, nn.Embedding) or "Embedding" in module_type:
        return "scalar", "embedding"
    if isinstance(module, NORMS):
        return "scalar", module_type
    if _compat.packs_parts(parameter):
        raise ValueError(
            f"{name} of {module_type} packs parts of different sizes, each cut over tensor-parallel"
            f' ranks, which is not supported; leave it to AdamW: scalars=["{name.split(".")[-2]}"]'
        )
    if module_type == "GroupedMLP":
        raise ValueError(
            f"{name}: Megatron's GroupedMLP packs all experts into one weight, column by column;"
            " use TEGroupedMLP, or SequentialMLP (moe_grouped_gemm=False), which keep one each"
        )
    return "matrix", module_type


def fused_splits(model: nn.Module) -> dict[int, Split]:
    """Return the split of each weight that holds several matrices above each other, by its id.

    Those are linear_qkv of attention, and linear_fc1 of gated MLPs.
    """
    splits: dict[int, Split] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        qkv, fc1 = (getattr(module, child, None) for child in ("linear_qkv", "linear_fc1"))
        if isinstance(qkv, nn.Module) and config is not None:
            rows = _query_key_value(module, config)
            splits.update((id(weight), rows) for weight in _linear_weights(qkv))
        if isinstance(fc1, nn.Module) and getattr(config, "gated_linear_unit", False):
            _check_interleave(config)
            splits.update((id(weight), GATE_AND_UP) for weight in _linear_weights(fc1))
    return splits


def _query_key_value(attention: Any, config: Any) -> list[int]:
    """Return the rows of q, (gate,) k and v in each query group of an attention's linear_qkv.

    The weight holds the query groups one after the other, each with these rows.
    """
    width = _compat.head_size(attention)
    queries = config.num_attention_heads // config.num_query_groups * width
    gate = [queries] if getattr(config, "attention_output_gate", False) else []
    return [queries, *gate, width, width]


def _check_interleave(config: Any) -> None:
    """Raise a ValueError if rows of gate and up are interleaved in blocks."""
    for setting in ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"):
        if getattr(config, setting, None) is not None:
            raise ValueError(
                f"{setting} is {getattr(config, setting)}: gate and up interleaved in blocks are"
                " not supported; leave it unset"
            )


def _linear_weights(linear: nn.Module) -> list[nn.Parameter]:
    """Return the weight of a linear layer, or of each expert in a grouped one."""
    return [p for name, p in linear.named_parameters() if p.ndim == 2 and "weight" in name]
