"""Layouts of parameters that flat sequences hold, as ZeRO cuts them: arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding.layout import Cut, Layout, flat_layout


def in_one_sequence(
    placed: Iterable[tuple[ParamSpec, int]], run_numel: int, ranks: int
) -> list[Layout]:
    """Return the layouts of matrices in one flat sequence that ranks have cut into equal runs.

    Args:
        placed: each parameter, and the place of its first element in the sequence.
        run_numel: the number of elements that each rank stores.
        ranks: the number of ranks.
    """
    cut = Cut.even(run_numel, ranks)
    return [flat_layout(m, cut, offset=offset) for route, offset in placed for m in route.matrices]


def in_own_runs(placed: Iterable[tuple[ParamSpec, int]], ranks: int) -> tuple[list[Layout], int]:
    """Return the layouts of matrices whose parameters are each cut into equal runs, one a rank.

    A rank's runs of all parameters lie one after the other in one local tensor.

    Args:
        placed: each parameter, and the number of its elements that each rank stores.
        ranks: the number of ranks.

    Returns:
        The layouts, and the number of elements of a rank's local tensor.
    """
    layouts, base = [], 0
    for route, run_numel in placed:
        cut = Cut.even(run_numel, ranks)
        layouts += [flat_layout(matrix, cut, base=base) for matrix in route.matrices]
        base += run_numel
    return layouts, base


def whole(routes: Iterable[ParamSpec]) -> list[Layout]:
    """Return the layouts of matrices whose parameters are whole, each a local tensor of its own."""
    layouts = []
    for index, route in enumerate(routes):
        cut = Cut((0, math.prod(route.shape)))
        layouts += [flat_layout(matrix, cut, tensor=index) for matrix in route.matrices]
    return layouts
