"""Names of a Megatron model's parameters that are the same however the model is cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from torch import nn

from spectral_dist.integrations.megatron import _compat

Experts: TypeAlias = tuple[int, Sequence[int]] | None
"""Of a module among a rank's experts: parts of the name before their number, and their numbers."""
OF_EXPERT = re.compile(r"(weight|bias)(\d+)")
"""What a grouped layer calls its i-th expert's."""
EMBEDDING = ("embedding", "word_embeddings", "weight")


def global_names(chunks: Sequence[nn.Module]) -> dict[int, str]:
    """Each parameter's name in the whole model, by its id.

    Layers and experts have their numbers in the whole model, from 0, whichever pipeline stage,
    virtual stage or expert-parallel rank holds them; grouped experts are named like those of a
    sequence of MLPs; a tied output layer is the embedding. A parameter in two places has the first.

    Args:
        chunks: this rank's parts of the model, wrapped or not.

    Raises:
        ValueError: two parameters of one name.
    """
    names: dict[int, str] = {}
    taken: dict[str, int] = {}
    for chunk in chunks:
        for parts, parameter in _walk(unwrap(chunk)):
            if id(parameter) in names:
                continue
            name = names[id(parameter)] = ".".join(parts)
            if taken.setdefault(name, id(parameter)) != id(parameter):
                raise ValueError(
                    f"two parameters of this rank are {name} in the whole model, so their states"
                    " could not be told apart: number layers by layer_number, from 1, over all"
                    " pipeline stages"
                )
    return names


def copies(chunks: Sequence[nn.Module]) -> set[int]:
    """ids of parameters that an earlier (or, of output layers, a later) stage has, too.

    The embedding beside a tied output layer, or beside multi-token prediction.
    """
    found: set[int] = set()
    stages: list[Any] = [module for chunk in chunks for module in unwrap(chunk).modules()]
    for stage in stages:
        for module in _compat.ends_of_others(stage):
            found |= {id(parameter) for parameter in module.parameters()}
        tied = _compat.tied_weight(stage)
        if tied is not None and not _compat.is_first_stage(stage):
            found.add(id(tied))
    return found


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and Float16Module."""
    inside: Any = chunk
    while isinstance(getattr(inside, "module", None), nn.Module):
        inside = inside.module
    model: nn.Module = inside
    return model


def _walk(
    module: nn.Module, path: tuple[str, ...] = (), experts: Experts = None
) -> Iterator[tuple[tuple[str, ...], nn.Parameter]]:
    """(parts of its name, the parameter) of all of them below the module."""
    tied = _compat.tied_weight(module)
    if tied is not None:
        yield (*path, *EMBEDDING), tied
    for leaf, parameter in module.named_parameters(recurse=False):
        grouped = OF_EXPERT.fullmatch(leaf)
        if experts and grouped:
            depth, numbers = experts
            number = str(numbers[int(grouped[2])])
            yield (*path[:depth], number, *path[depth:], grouped[1]), parameter
        else:
            yield (*path, leaf), parameter
    labels = _numbers(module)
    held = _compat.expert_numbers(module)
    for name, child in module.named_children():
        at = (*path, labels.get(name, name))
        if name == "experts" and held is not None:
            yield from _walk(child, at, (len(at), held))
        elif name == "local_experts" and experts:
            for own, expert in zip(experts[1], child.children(), strict=True):
                yield from _walk(expert, (*path, str(own)))
        else:
            yield from _walk(child, at, experts)


def _numbers(module: nn.Module) -> dict[str, str]:
    """Numbers in the whole model of a list of layers, where they know them, by those here."""
    if not isinstance(module, nn.ModuleList):
        return {}
    numbers = [number for layer in module if (number := _compat.layer_number(layer)) is not None]
    if len(numbers) < len(module) or len(set(numbers)) < len(numbers):
        return {}
    return {str(i): str(number - 1) for i, number in enumerate(numbers)}
