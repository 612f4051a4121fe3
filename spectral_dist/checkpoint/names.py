"""What a checkpoint calls parameters: as the model has them, without what wrappers add."""

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
    """The names of a checkpoint, by those that the optimizer knows."""

    of_parameters: Mapping[str, str]
    of_matrices: Mapping[str, str]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names in the plain model, tied ones by each of theirs."""
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
        # of what a framework has cut, a rank may have other tensors than routes
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
    """Return the names that a checkpoint has, which an older release may have written otherwise.

    They were those of the wrapped model, and those of a part of it, if groups were of that.

    Args:
        names: as they would be saved.
        saved: the keys of the checkpoint.
    """
    spelled: dict[str, dict[str, str]] = {STATE: {}, MATRICES: {}}
    for key in saved:
        for prefix, known in spelled.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix).rpartition(".")[0]
                known.setdefault(plain_name(name), name)

    def spell(names: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
        return {
            own: known.get(name) or known.get(plain_name(own)) or name
            for own, name in names.items()
        }

    return Names(
        spell(names.of_parameters, spelled[STATE]), spell(names.of_matrices, spelled[MATRICES])
    )
