"""Megatron-core's parameters of a model, from the config that transformers has for it.

Names, shapes and order are those of GPTModel with Megatron's local layers or Transformer Engine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectral_dist.estimate.job import Job
from spectral_dist.params.spec import ParamInfo, ParamSpec
from spectral_dist.params.splits import Split

GATE_AND_UP = 2
"""The matrices of a gated layer's first weight, gate above up, each of which is cut by itself."""
FAMILIES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset(),
    "mixtral": frozenset({"experts"}),
    "qwen2": frozenset({"biases"}),
    "qwen3": frozenset({"norms"}),
    "qwen3_moe": frozenset({"norms", "experts"}),
}
"""What each model_type has: experts, biases of q, k and v, norms of the heads of q and k."""
PLAIN: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
"""Values that a config must have, where it has the setting."""


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model.

    Attributes:
        name: in the whole model, as ``integrations.megatron.names`` has it.
        shape: whole.
        reason: what it is, for the table of parameters.
        kind: "matrix" or "scalar".
        layer: the layer's number; None: it is of the model's first or last stage.
        cut: the dimension that tensor parallelism cuts; None: all tensor-parallel ranks have it.
        split: how its rows hold several matrices.
        expert: the number of the expert that it belongs to; None: it belongs to none.
        is_last: of a parameter outside of layers: whether it is of the last stage.
        is_shared: whether it is one of two copies of a tied embedding.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    kind: str = "scalar"
    layer: int | None = None
    cut: int | None = None
    split: Split | None = None
    expert: int | None = None
    is_last: bool = False
    is_shared: bool = False

    @property
    def stride(self) -> int:
        """Return the number of parts of the cut dimension that each rank stores a piece of."""
        return GATE_AND_UP if self.split == GATE_AND_UP else 1

    def stage(self, layers: int, stages: int) -> int:
        """Return the pipeline stage that has it.

        Args:
            layers: of the model.
            stages: that share them evenly.
        """
        if self.layer is None:
            return stages - 1 if self.is_last else 0
        return self.layer * stages // layers


class MegatronModel(nn.Module):
    """The parameters of a whole model, without memory, in a tree of modules named as Megatron's.

    Args:
        config: of transformers.
        job: with its parallel sizes and kinds of layers.

    Attributes:
        num_layers, num_experts: of the model.

    Raises:
        ValueError: a model that is not known, or does not fit the sizes.
    """

    def __init__(self, config: Any, job: Job) -> None:
        super().__init__()
        features = _features(config)
        self.num_layers = int(config.num_hidden_layers)
        self.num_experts = _num_experts(config) if "experts" in features else 0
        _check_sizes(config, job, self.num_experts)
        self._weights: dict[int, Weight] = {}
        for path, weight in _weights(config, job, features, self.num_experts):
            *modules, leaf = path.split(".")
            module: nn.Module = self
            for name in modules:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            parameter = nn.Parameter(torch.empty(weight.shape, dtype=job.dtype, device="meta"))
            module.register_parameter(leaf, parameter)
            self._weights[id(parameter)] = weight

    def weight(self, spec: ParamSpec) -> Weight:
        """Return what a parameter is, by its spec."""
        return self._weights[id(spec.parameter)]

    def inspector(self, name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
        """Return what ``MegatronReader`` says of a parameter.

        Args:
            name: of the parameter.
            parameter: itself.
            module: that has it.
        """
        weight = self._weights[id(parameter)]
        split = weight.split
        heads = (split[-1],) * len(split) if isinstance(split, list) else ()
        return ParamInfo(
            weight.shape, weight.kind, weight.reason, split=split, heads=heads, name=weight.name
        )


def _features(config: Any) -> frozenset[str]:
    """Return what a model has beside a Llama's layers.

    Raises:
        ValueError: another model, or a setting that Megatron's model here has not.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"model_type is {family!r}; engine megatron is estimated for"
            f" {', '.join(FAMILIES)}, so write one of those, or another engine"
        )
    for name, value in PLAIN.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; engine megatron is estimated with {value!r}"
                " only, so write that, or another engine"
            )
    return FAMILIES[family]


def _num_experts(config: Any) -> int:
    """Return the number of experts of a layer."""
    number: int = getattr(config, "num_local_experts", None) or config.num_experts
    return number


def _expert_size(config: Any) -> int:
    """Return the rows of gate or up of an expert."""
    size: int = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return size


def _check_sizes(config: Any, job: Job, experts: int) -> None:
    """Raise a ValueError if parallelism does not divide a model evenly."""
    sizes = [("pp", job.pipeline, "num_hidden_layers", int(config.num_hidden_layers))]
    names = ("num_attention_heads", "intermediate_size", "vocab_size")
    sizes += [("tp", job.tensor, name, int(getattr(config, name))) for name in names]
    sizes.append(("ep", job.expert, "number of experts", experts))
    if experts and job.expert > 1:
        sizes.append(
            ("etp", job.expert_tensor or job.tensor, "experts' size", _expert_size(config))
        )
    keys = int(config.num_key_value_heads)
    if max(keys, job.tensor) % min(keys, job.tensor):
        sizes.append(("tp", job.tensor, "num_key_value_heads", keys))
    for flag, ranks, name, size in sizes:
        if size % ranks or (flag == "ep" and ranks > 1 and not size):
            raise ValueError(
                f"{flag} is {ranks}, but the model's {name}, {size}, is no multiple of it; write"
                f" a {flag} that divides it"
            )


def _weights(
    config: Any, job: Job, features: frozenset[str], experts: int
) -> Iterator[tuple[str, Weight]]:
    """Yield (Megatron's name, parameter) of all parameters, in Megatron's order."""
    embedding = "embedding.word_embeddings.weight"
    shape, width = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    head = "embedding or output head"
    is_tied = bool(config.tie_word_embeddings)
    is_shared = is_tied and job.pipeline > 1
    yield embedding, Weight(embedding, shape, head, cut=0, is_shared=is_shared)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, job, features, experts, layer)
    norm = "decoder.final_layernorm.weight"
    yield norm, Weight(norm, width, "1-D", is_last=True)
    output = "output_layer.weight"
    if not is_tied or is_shared:
        name = embedding if is_shared else output
        yield output, Weight(name, shape, head, cut=0, is_last=True, is_shared=is_shared)


def _layer(
    config: Any, job: Job, features: frozenset[str], experts: int, layer: int
) -> Iterator[tuple[str, Weight]]:
    """Yield (Megatron's name, parameter) of one layer's parameters, in Megatron's order."""
    hidden = config.hidden_size
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups * width
    rows = config.num_attention_heads * width + 2 * groups * width
    start = f"decoder.layers.{layer}."

    def one(name: str, *shape: int, **more: Any) -> tuple[str, Weight]:
        reason = f"{len(shape)}-D"
        return start + name, Weight(start + name, shape, reason, layer=layer, **more)

    def matrix(path: str, *shape: int, **more: Any) -> tuple[str, Weight]:
        kind = "RowParallelLinear" if more.get("cut") == 1 else "ColumnParallelLinear"
        usual = {"name": start + path, "reason": kind, "kind": "matrix", "layer": layer}
        return start + path, Weight(shape=shape, **{**usual, **more})

    attention, fused = "self_attention.", job.layers == "transformer_engine"
    if not fused:
        yield one("input_layernorm.weight", hidden)
    yield matrix(attention + "linear_proj.weight", hidden, queries * groups, cut=1)
    if fused:
        yield one(attention + "linear_qkv.layer_norm_weight", hidden)
    split = [queries, width, width]
    yield matrix(attention + "linear_qkv.weight", rows, hidden, cut=0, split=split)
    if "biases" in features:
        yield one(attention + "linear_qkv.bias", rows, cut=0)
    if "norms" in features:
        yield one(attention + "q_layernorm.weight", width)
        yield one(attention + "k_layernorm.weight", width)
    if not fused or experts:
        yield one("pre_mlp_layernorm.weight", hidden)
    if not experts:
        size = config.intermediate_size
        if fused:
            yield one("mlp.linear_fc1.layer_norm_weight", hidden)
        yield matrix("mlp.linear_fc1.weight", 2 * size, hidden, cut=0, split=GATE_AND_UP)
        yield matrix("mlp.linear_fc2.weight", hidden, size, cut=1)
        return
    yield matrix("mlp.router.weight", experts, hidden, reason="TopKRouter")
    size = _expert_size(config)
    parts: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
        "linear_fc1": ((2 * size, hidden), {"cut": 0, "split": GATE_AND_UP}),
        "linear_fc2": ((hidden, size), {"cut": 1}),
    }
    each = [(part, number) for number in range(experts) for part in parts]
    if job.grouped_experts:
        each = [(part, number) for part in parts for number in range(experts)]
    for part, number in each:
        shape, more = parts[part]
        path = f"mlp.experts.local_experts.{number}.{part}.weight"
        if job.grouped_experts:
            path = f"mlp.experts.{part}.weight{number}"
        name = f"{start}mlp.experts.{number}.{part}.weight"
        yield matrix(path, *shape, name=name, expert=number, **more)
