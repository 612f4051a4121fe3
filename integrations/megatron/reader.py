"""Which parameters of a Megatron model are matrices, and how they hold them, by its own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron._compat import cut_dimension, is_expert
from spectral_dist.integrations.megatron.ranks import Ranks
from spectral_dist.params.classify import NORMS
from spectral_dist.params.spec import Inspector, ParamInfo
from spectral_dist.params.splits import Split

GATE_AND_UP = 2
"""Parts of a gated layer's first weight."""


class MegatronReader:
    """Reads parameters by Megatron's attributes and the modules that they are found in.

    Args:
        ranks: of the dense parameters, and of the experts.
        names: of parameters in the whole model, by their ids.
    """

    def __init__(self, ranks: Ranks, expert_ranks: Ranks, names: Mapping[int, str]) -> None:
        self.ranks, self.expert_ranks, self.names = ranks, expert_ranks, names
        self._gated: set[int] = set()

    def __call__(self, model: nn.Module) -> Inspector:
        """What each parameter of the model is, by itself."""
        splits = fused(model)
        self._gated |= {key for key, split in splits.items() if split == GATE_AND_UP}

        def read(name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
            shape = self._whole(parameter)
            kind, reason = _kind(name, parameter, module, len(shape))
            split, known_as = splits.get(id(parameter)), self.names[id(parameter)]
            return ParamInfo(shape, kind, reason, split=split, name=known_as)

        return read

    def of(self, parameter: nn.Parameter) -> Ranks:
        """The ranks that a parameter is spread over."""
        return self.expert_ranks if is_expert(parameter) else self.ranks

    def stride(self, parameter: nn.Parameter) -> int:
        """How many parts of the cut dimension each rank stores a piece of, one after the other."""
        if id(parameter) in self._gated:
            return GATE_AND_UP  # grouped experts' weights say 1
        return _compat.stride(parameter)

    def _whole(self, parameter: nn.Parameter) -> tuple[int, ...]:
        shape, dim = list(parameter.shape), cut_dimension(parameter)
        if dim is not None:
            shape[dim] *= self.of(parameter).tensor
        return tuple(shape)


def _kind(name: str, parameter: Any, module: nn.Module, ndim: int) -> tuple[str, str]:
    kind = type(module).__name__
    if ndim != 2:
        return "scalar", f"{ndim}-D"
    if _compat.is_embedding_or_output(parameter):
        return "scalar", "embedding or output head"
    if isinstance(module, nn.Embedding) or "Embedding" in kind:
        return "scalar", "embedding"
    if isinstance(module, NORMS):
        return "scalar", kind
    if _compat.packs_parts(parameter):
        raise ValueError(
            f"{name} of {kind} packs parts of different sizes, each cut over tensor-parallel ranks,"
            f' which is not supported; leave it to AdamW: scalars=["{name.split(".")[-2]}"]'
        )
    if kind == "GroupedMLP":
        raise ValueError(
            f"{name}: Megatron's GroupedMLP packs all experts into one weight, column by column;"
            " use TEGroupedMLP, or SequentialMLP (moe_grouped_gemm=False), which keep one each"
        )
    return "matrix", kind


def fused(model: nn.Module) -> dict[int, Split]:
    """ids of weights that hold several matrices one above the other, and how."""
    splits: dict[int, Split] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        qkv, fc1 = (getattr(module, child, None) for child in ("linear_qkv", "linear_fc1"))
        if isinstance(qkv, nn.Module) and config is not None:
            parts = _query_key_value(module, config)
            splits.update((id(weight), parts) for weight in _weights(qkv))
        if isinstance(fc1, nn.Module) and getattr(config, "gated_linear_unit", False):
            _check_interleave(config)
            splits.update((id(weight), GATE_AND_UP) for weight in _weights(fc1))
    return splits


def _query_key_value(attention: Any, config: Any) -> list[int]:
    """Rows of q, (gate,) k and v in each query group: the weight repeats them group by group."""
    width = _compat.head_size(attention)
    queries = config.num_attention_heads // config.num_query_groups * width
    gate = [queries] if getattr(config, "attention_output_gate", False) else []
    return [queries, *gate, width, width]


def _check_interleave(config: Any) -> None:
    for setting in ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"):
        if getattr(config, setting, None) is not None:
            raise ValueError(
                f"{setting} is {getattr(config, setting)}: gate and up interleaved in blocks are"
                " not supported; leave it unset"
            )


def _weights(linear: nn.Module) -> list[nn.Parameter]:
    """Of a linear layer, or of each expert of a grouped one."""
    return [p for name, p in linear.named_parameters() if p.ndim == 2 and "weight" in name]
