"""What the parameters of torch's own modules, and of modules made of them, are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from spectral_dist.params.architectures import (
    experts_above_each_other,
    fused_experts,
    fused_linear,
    transformers_bases,
)
from spectral_dist.params.attention import packed_heads, projection_head
from spectral_dist.params.heads import full_shape, output_heads
from spectral_dist.params.spec import Inspector, ParamInfo, plain_name

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EXPERTS = re.compile("expert", re.IGNORECASE)
"""Matches names of 3-D parameters that hold a matrix for each expert."""
EXPERT_CLASSES = re.compile("expert|moe$", re.IGNORECASE)
"""Matches names of classes of modules that hold such parameters."""
TRANSPOSED_EXPERTS = {"GptOssExperts", "Llama4TextExperts", "AriaGroupedExpertsGemm"}
"""Classes whose experts are stored (in, out), in releases of transformers whose modules do not say
so themselves (``is_transposed``)."""


def _kind(module: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Return a parameter's (kind, reason) by its module's type, or by the names used for experts.

    Args:
        module: that has the parameter.
        name: of the parameter.
        shape: whole and unsharded.
    """
    leaf, kind = name.rsplit(".", 1)[-1], type(module).__name__
    if len(shape) < 2:
        return "scalar", f"{len(shape)}-D"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "scalar", "embedding"
    if isinstance(module, NORMS):
        return "scalar", kind
    if isinstance(module, nn.Linear) and leaf == "weight":
        return "matrix", kind
    if isinstance(module, nn.MultiheadAttention) and leaf.endswith("_proj_weight"):
        return "matrix", f"{kind}, q, k and v each"
    if isinstance(module, CONVOLUTIONS) and leaf == "weight":
        if module.groups > 1:
            return "scalar", f"{kind} with groups"
        return "matrix", f"{kind} as out x (in * kernel)"
    if count := experts_above_each_other(module, leaf):
        return "matrix", f"{count} experts one above the other in {kind}"
    if _stored_transposed(module, leaf):
        stack = f"stack of {shape[0]} in {kind}" if len(shape) == 3 else kind
        return "matrix", f"{stack}, read out x in"
    if len(shape) == 3 and min(shape) > 1:
        if _holds_experts(module, name):
            return "matrix", f"stack of {shape[0]} in {kind}"
        return "scalar", f"{leaf} of {kind} is no known stack of matrices"
    return "scalar", f"{leaf} of {kind} is no known matrix"


def _holds_experts(module: nn.Module, name: str) -> bool:
    """Return whether a 3-D parameter has a matrix for each expert, by its name and its classes."""
    if isinstance(module, nn.ParameterList | nn.ParameterDict) or type(module) is nn.Module:
        classes: list[str] = []
    else:
        classes = [base.__name__ for base in type(module).__mro__]
    return bool(EXPERTS.search(name)) or any(EXPERT_CLASSES.search(c) for c in classes)


def _stored_transposed(module: nn.Module, leaf: str) -> bool:
    """Return whether transformers stores a weight (in, out): GPT-2's, and some experts."""
    for base in transformers_bases(module):
        if base == "DbrxExpertGLU":
            return leaf == "w2"
        if base == "Conv1D":
            return leaf == "weight"
        if base in TRANSPOSED_EXPERTS or getattr(module, "is_transposed", False):
            return leaf in ("gate_up_proj", "up_proj", "down_proj", "weight")
    return False


def _plain_class(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before torch parametrized it."""
    return str(type_before_parametrizations(module).__name__)


def torch_inspector(model: nn.Module, outputs: Mapping[int, str] | None = None) -> Inspector:
    """Return an inspector of parameters of torch's own modules, and of modules made of them.

    Args:
        model: that has the parameters.
        outputs: {id of a parameter that maps to the vocabulary: how it was recognized}; None: as
            the model itself shows them.
    """
    outputs = output_heads(model) if outputs is None else outputs
    parametrized = {
        id(each): (module, leaf)
        for module in model.modules()
        for leaf, each in getattr(module, "parametrizations", {}).items()
    }
    modules = {  # by plain name; of a wrapper and the module in it, the latter
        plain_name(f"{name}.")[:-1]: module
        for name, module in model.named_modules(remove_duplicate=False)
    }

    def inspect(name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
        leaf, shape = name.rsplit(".", 1)[-1], full_shape(parameter)
        kind, reason = _kind(module, name, shape)
        layer, weight = parametrized.get(id(module), (module, leaf))
        if layer is not module and len(shape) > 1:  # the trained tensor is not what multiplies
            kind, reason = "scalar", f"parametrized {weight} of {_plain_class(layer)}"
        if id(parameter) in outputs:
            kind, reason = "scalar", outputs[id(parameter)]
        view: tuple[int, ...] = ()
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and len(shape) > 1:
            view = shape[0], math.prod(shape[1:])
        info = ParamInfo(shape, kind, reason, view, transposed=_stored_transposed(module, leaf))
        return _with_parts(info, name, module, modules) if kind == "matrix" else info

    return inspect


def _with_parts(
    info: ParamInfo, name: str, module: nn.Module, modules: Mapping[str, nn.Module]
) -> ParamInfo:
    """Return what a matrix is with the matrices that it holds, and their heads.

    Args:
        info: what the module's type says.
        name: of the parameter.
        module: that has it.
        modules: of the model, by name.
    """
    path, _, leaf = name.rpartition(".")
    if isinstance(module, nn.MultiheadAttention):
        split = 3 if leaf == "in_proj_weight" else None
        return replace(info, split=split, heads=packed_heads(module, leaf))
    if count := experts_above_each_other(module, leaf):
        return replace(info, view=(count, info.shape[0] // count, info.shape[1]))
    fused, heads = fused_experts(module, leaf), 0
    if path and (isinstance(module, nn.Linear) or (info.transposed and len(info.shape) == 2)):
        parent, _, child = path.rpartition(".")
        fused = fused_linear(modules[parent], child, info.shape[1 if info.transposed else 0])
        heads = projection_head(modules[parent], child)
    if fused is None:
        return replace(info, heads=(heads,)) if heads else info
    return replace(info, split=fused.split, holds=fused.words(), heads=fused.heads)
