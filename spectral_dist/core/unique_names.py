"""Unique names for the parameters of several models in one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spectral_dist.params.spec import ParamSpec


def with_unique_names(routes: Sequence[ParamSpec], known: Sequence[ParamSpec]) -> list[ParamSpec]:
    """Return specs with names that no other spec has: "weight", then "weight#2".

    Matrix state and checkpoints are keyed by name, and two models (actor and critic) may have
    parameters of one name.

    Args:
        routes: the specs of a new group.
        known: the specs of the groups before it.
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
    """Return a spec under another name, with its matrices renamed.

    Args:
        route: the spec.
        name: its new name, which replaces the old one at the beginning of the matrices' names.
        number: that is added to a matrix's name which does not begin with the old one.
    """
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
