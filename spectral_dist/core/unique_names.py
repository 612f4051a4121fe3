"""Names of parameters of several models in one optimizer, told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spectral_dist.params.spec import ParamSpec


def with_unique_names(routes: Sequence[ParamSpec], known: Sequence[ParamSpec]) -> list[ParamSpec]:
    """Return routes with names that no other one has: "weight", then "weight#2".

    State of matrices and checkpoints are by name, and two models (actor and critic) have the same.

    Args:
        routes: of a new group.
        known: of the groups before it.
    """
    taken = {route.name for route in known}
    result = []
    for route in routes:
        name, number = route.name, 1
        while name in taken:
            number += 1
            name = f"{route.name}#{number}"
        taken.add(name)
        result.append(route if number == 1 else _renamed(route, name, number))
    return result


def _renamed(route: ParamSpec, name: str, number: int) -> ParamSpec:
    """Return a route by another name; its matrices' names are made of it, or get the number."""
    matrices = tuple(
        replace(
            matrix,
            name=name + matrix.name.removeprefix(route.name)
            if matrix.name.startswith(route.name)
            else f"{matrix.name}#{number}",
        )
        for matrix in route.matrices
    )
    return replace(route, name=name, matrices=matrices)
