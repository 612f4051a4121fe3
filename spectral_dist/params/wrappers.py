"""Check how a model was wrapped or sharded that ``spectral_dist.poet`` has converted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_poet_wrapping(model: nn.Module, skews: dict[str, nn.Parameter]) -> None:
    """Check that the wrappers of a converted model can train its rotations.

    Args:
        model: as the user has it, in its wrappers.
        skews: POET's skew parameters by name.

    Raises:
        ValueError: DistributedDataParallel does not reduce a skew parameter, or FSDP2 would refuse
            the dtypes of a module; it says what to write.
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
    skew_ids = {id(skew) for skew in skews.values()}
    for name, module in model.named_modules():
        if _is_fsdp(module):
            _check_dtypes(name, module, skew_ids)


def _check_dtypes(name: str, module: nn.Module, skew_ids: set[int]) -> None:
    """Raise a ValueError where FSDP2 would fail on an assertion in the first forward pass.

    Args:
        name: of the module.
        module: to which fully_shard was applied.
        skew_ids: ids of POET's skew parameters.
    """
    dtypes_by_mesh: dict[object, dict[torch.dtype, str]] = {}
    has_skew = False
    for key, parameter in _sharded_params(name, module):
        mesh = getattr(parameter, "device_mesh", None)  # None: it was left out
        if mesh is not None and parameter.requires_grad:
            dtypes_by_mesh.setdefault(mesh, {}).setdefault(parameter.dtype, key)
            has_skew = has_skew or id(parameter) in skew_ids
    for dtypes in dtypes_by_mesh.values():
        if has_skew and len(dtypes) > 1:
            examples = ", ".join(f"{key} is {dtype}" for dtype, key in dtypes.items())
            raise ValueError(
                f"{examples}: FSDP2 takes one dtype of all that trains in a module, and POET's"
                " skew parameters are float32. Convert the model in float32 and compute in"
                " bfloat16: fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype="
                "torch.bfloat16, reduce_dtype=torch.float32)). The frozen weights alone may be"
                " bfloat16 before that: layer.weight.data = layer.weight.data.bfloat16()"
            )


def _sharded_params(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of what fully_shard shards with a module.

    The parameters of a submodule to which fully_shard was applied itself are left out.
    """
    for leaf, parameter in module.named_parameters(recurse=False):
        yield f"{name}.{leaf}".lstrip("."), parameter
    for leaf, child in module.named_children():
        if not _is_fsdp(child):
            yield from _sharded_params(f"{name}.{leaf}".lstrip("."), child)


def _is_fsdp(module: nn.Module) -> bool:
    """Return whether fully_shard was applied to a module."""
    return hasattr(module, "set_requires_gradient_sync")
