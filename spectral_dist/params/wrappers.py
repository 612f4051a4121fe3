"""What is wrong with a wrapped or sharded model that ``spectral_dist.poet`` has converted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check(model: nn.Module, skews: dict[str, nn.Parameter]) -> None:
    """ValueError that says what to write: ``skews`` that DDP does not know, dtypes not for FSDP2.

    ``model``: as the user has it, in its wrappers.
    """
    while isinstance(inner := getattr(model, "_orig_mod", model), nn.Module) and inner is not model:
        model = inner
    if isinstance(model, DistributedDataParallel):
        reduced = {id(p) for p in model._module_parameters}
        for name, skew in skews.items():
            if id(skew) not in reduced and name not in model.parameters_to_ignore:
                raise ValueError(
                    f"{name} is not reduced by DistributedDataParallel, which was made before it;"
                    " call spectral_dist.poet.convert(model) first, and wrap the model then"
                )
    rotating = {id(skew) for skew in skews.values()}
    for name, module in model.named_modules():
        if _is_fsdp(module):
            _check_dtypes(name, module, rotating)


def _check_dtypes(name: str, module: nn.Module, rotating: set[int]) -> None:
    """ValueError in place of an assertion of FSDP2's in the first forward pass."""
    found: dict[object, dict[torch.dtype, str]] = {}
    concerned = False
    for key, parameter in _own(name, module):
        mesh = getattr(parameter, "device_mesh", None)  # None: it was left out
        if mesh is not None and parameter.requires_grad:
            found.setdefault(mesh, {}).setdefault(parameter.dtype, key)
            concerned = concerned or id(parameter) in rotating
    for dtypes in found.values():
        if concerned and len(dtypes) > 1:
            examples = ", ".join(f"{key} is {dtype}" for dtype, key in dtypes.items())
            raise ValueError(
                f"{examples}: FSDP2 takes one dtype of all that trains in a module, and POET's"
                " skew parameters are float32. Convert the model in float32 and compute in"
                " bfloat16: fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype="
                "torch.bfloat16, reduce_dtype=torch.float32)). The frozen weights alone may be"
                " bfloat16 before that: layer.weight.data = layer.weight.data.bfloat16()"
            )


def _own(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that this fully_shard shards: not those of a module sharded by itself."""
    for leaf, parameter in module.named_parameters(recurse=False):
        yield f"{name}.{leaf}".lstrip("."), parameter
    for leaf, child in module.named_children():
        if not _is_fsdp(child):
            yield from _own(f"{name}.{leaf}".lstrip("."), child)


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")
