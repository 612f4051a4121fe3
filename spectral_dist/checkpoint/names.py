"""Names of parameters in checkpoints: those of the plain model, without what wrappers add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.params.spec import WRAPPERS, plain_name

STATE, MATRICES = "optimizer.state.", "optimizer.matrices."
WRAPPED = tuple(wrapper.removesuffix(".") for wrapper in WRAPPERS)


@dataclass(frozen=True)
class Names:
    """The names in a checkpoint, by the names that the optimizer has.

    Attributes:
        of_parameters: for each parameter.
        of_matrices: for each matrix.
    """

    of_parameters: Mapping[str, str]
    of_matrices: Mapping[str, str]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their names without wrappers; tied ones by each name."""
    parameters: dict[str, nn.Parameter] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            parameters[f"{prefix}{leaf}"] = parameter
        for leaf, child in module.named_children():
            is_wrapped = leaf in WRAPPED or (
                leaf == "module" and isinstance(module, DistributedDataParallel)
            )
            walk(child, prefix if is_wrapped else f"{prefix}{leaf}.")

    walk(model, "")
    return parameters


def names_of(optimizer: ShardedOptimizer, model: nn.Module | None = None) -> Names:
    """Return the names of an optimizer's parameters and matrices.

    Args:
        optimizer: whose they are.
        model: that has the parameters, and in which several models may have names of their own.
            None: as ``param_groups`` has read them.
    """
    by_parameter: dict[int, str] = {}
    for name, parameter in (named(model) if model is not None else {}).items():
        by_parameter.setdefault(id(parameter), name)
    parameters: dict[str, str] = {}
    matrices: dict[str, str] = {}
    for group in optimizer.param_groups:
        routes = optimizer.routes[group["id"]]
        # where a framework has sharded parameters, a rank may have other tensors than specs
        tensors = group["params"] if len(group["params"]) == len(routes) else [None] * len(routes)
        for route, p in zip(routes, tensors, strict=True):
            name = by_parameter.get(id(p), plain_name(route.name))
            parameters[route.name] = name
            for matrix in route.matrices:
                rest = matrix.name.removeprefix(route.name)
                is_part = matrix.name.startswith(route.name)
                matrices[matrix.name] = name + rest if is_part else plain_name(matrix.name)
    return Names(parameters, matrices)


def names_in(names: Names, saved: Iterable[str]) -> Names:
    """Return the names that are in a checkpoint, which differ if an older release has saved it.

    Older releases wrote the names in the wrapped model, or in a part of the model if groups were
    made of that part.

    Args:
        names: as this release would save them.
        saved: the keys of the checkpoint.
    """
    saved_names: dict[str, dict[str, str]] = {STATE: {}, MATRICES: {}}  # by plain name
    for key in saved:
        for prefix, by_plain_name in saved_names.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix).rpartition(".")[0]
                by_plain_name.setdefault(plain_name(name), name)

    def translate(names: Mapping[str, str], by_plain_name: Mapping[str, str]) -> dict[str, str]:
        return {
            known: by_plain_name.get(name) or by_plain_name.get(plain_name(known)) or name
            for known, name in names.items()
        }

    return Names(
        translate(names.of_parameters, saved_names[STATE]),
        translate(names.of_matrices, saved_names[MATRICES]),
    )
