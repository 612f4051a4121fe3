"""Names of a Megatron model's parameters that are the same however the model is cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from torch import nn

from spectral_dist.integrations.megatron import _compat

Experts: TypeAlias = tuple[int, Sequence[int]] | None
"""Of a module inside a rank's experts: the length of the name's prefix that the expert's number
follows, and the numbers of this rank's experts in the whole model. None outside of experts."""
OF_EXPERT = re.compile(r"(weight|bias)(\d+)")
"""The name in a grouped layer of its i-th expert's parameter, i counted on this rank."""
EMBEDDING = ("embedding", "word_embeddings", "weight")


def global_names(chunks: Sequence[nn.Module]) -> dict[int, str]:
    """Return each parameter's name in the whole model, by its id.

    Layers and experts have their numbers in the whole model, from 0, whichever pipeline stage,
    virtual stage or expert-parallel rank holds them. Grouped experts are named like those of a
    sequence of MLPs. A tied output layer has the embedding's name. A parameter that occurs in two
    places has the name of the first.

    Args:
        chunks: this rank's parts of the model, wrapped or not.

    Raises:
        ValueError: two parameters have the same name.
    """
    names: dict[int, str] = {}
    ids_by_name: dict[str, int] = {}
    for chunk in chunks:
        for parts, parameter in _named_parameters(unwrap(chunk)):
            if id(parameter) in names:
                continue
            name = names[id(parameter)] = ".".join(parts)
            if ids_by_name.setdefault(name, id(parameter)) != id(parameter):
                raise ValueError(
                    f"two parameters of this rank are {name} in the whole model, so their states"
                    " could not be told apart: number layers by layer_number, from 1, over all"
                    " pipeline stages"
                )
    return names


def stage_copies(chunks: Sequence[nn.Module]) -> set[int]:
    """Return the ids of parameters that another pipeline stage holds as well, and saves.

    That is an earlier stage, or of output layers a later one. Such a parameter is the embedding
    that a tied output layer, or multi-token prediction, needs on the last stage.

    Args:
        chunks: this rank's parts of the model, wrapped or not.
    """
    copies: set[int] = set()
    stages: list[Any] = [module for chunk in chunks for module in unwrap(chunk).modules()]
    for stage in stages:
        for module in _compat.duplicated_ends(stage):
            copies |= {id(parameter) for parameter in module.parameters()}
        tied = _compat.tied_weight(stage)
        if tied is not None and not _compat.is_first_stage(stage):
            copies.add(id(tied))
    return copies


def unwrap(chunk: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel and Float16Module."""
    inside: Any = chunk
    while isinstance(getattr(inside, "module", None), nn.Module):
        inside = inside.module
    model: nn.Module = inside
    return model


def joined(chunks: Sequence[nn.Module]) -> nn.Module:
    """Return one module that holds all parts of the model, unwrapped; the only part itself.

    Args:
        chunks: this rank's parts of the model, wrapped or not.
    """
    if len(chunks) == 1:
        return unwrap(chunks[0])
    whole = nn.Module()
    for index, chunk in enumerate(chunks):
        whole.add_module(f"chunk{index}", unwrap(chunk))
    return whole


def _named_parameters(
    module: nn.Module, path: tuple[str, ...] = (), experts: Experts = None
) -> Iterator[tuple[tuple[str, ...], nn.Parameter]]:
    """Yield (parts of its name in the whole model, the parameter) of all parameters in a module.

    Args:
        module: searched with all of its children.
        path: the parts of the module's own name.
        experts: set if the module is inside of a rank's experts.
    """
    tied = _compat.tied_weight(module)
    if tied is not None:
        yield (*path, *EMBEDDING), tied
    for leaf, parameter in module.named_parameters(recurse=False):
        grouped = OF_EXPERT.fullmatch(leaf)
        if experts and grouped:
            depth, expert_numbers = experts
            expert = str(expert_numbers[int(grouped[2])])
            yield (*path[:depth], expert, *path[depth:], grouped[1]), parameter
        else:
            yield (*path, leaf), parameter
    layer_numbers = _global_layer_numbers(module)
    local_experts = _compat.expert_numbers(module)
    for name, child in module.named_children():
        child_path = (*path, layer_numbers.get(name, name))
        if name == "experts" and local_experts is not None:
            yield from _named_parameters(child, child_path, (len(child_path), local_experts))
        elif name == "local_experts" and experts:
            for number, mlp in zip(experts[1], child.children(), strict=True):
                yield from _named_parameters(mlp, (*path, str(number)))
        else:
            yield from _named_parameters(child, child_path, experts)


def _global_layer_numbers(module: nn.Module) -> dict[str, str]:
    """Return {index in a list of layers: number in the whole model, from 0}.

    Empty if the module is no list of layers, or its layers do not know their numbers.
    """
    if not isinstance(module, nn.ModuleList):
        return {}
    numbers = [number for layer in module if (number := _compat.layer_number(layer)) is not None]
    if len(numbers) < len(module) or len(set(numbers)) < len(numbers):
        return {}
    return {str(i): str(number - 1) for i, number in enumerate(numbers)}
