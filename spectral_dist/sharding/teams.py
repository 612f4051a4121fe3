"""Teams: several ranks for one matrix, where there are fewer large matrices than ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

SLACK = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Shares of the mean load that a matrix may give to each rank of its team, which are tried."""
GAIN = 0.95
"""Teams are taken if they bring the largest load below this fraction of what it is without them."""


def team_sizes(costs: Sequence[float], able: Sequence[bool], length: int, rows: int) -> list[int]:
    """Return how many ranks each matrix is given: powers of two, 1 for an owner.

    Args:
        costs: of the matrices.
        able: whether each matrix can be worked on by several ranks.
        length: the ranks of which a team may be a part.
        rows: how many times as many ranks there are; a team lies in one row.
    """
    alone = [1] * len(costs)
    mean = sum(costs) / (length * rows)
    best, best_load = alone, max(seat(costs, alone, length, rows)[1], default=0.0)
    limit = GAIN * best_load
    for slack in SLACK if mean else ():
        sizes = [
            _power_of_two(cost / (slack * mean), length) if fine else 1
            for cost, fine in zip(costs, able, strict=True)
        ]
        load = max(seat(costs, sizes, length, rows)[1])
        if load < min(limit, best_load):
            best, best_load = sizes, load
    return best


def seat(
    costs: Sequence[float], sizes: Sequence[int], length: int, rows: int
) -> tuple[list[int], list[float]]:
    """Give each matrix a team of ranks by longest processing time, the largest teams first.

    Teams of a size are neighbours that begin at a multiple of it, so that smaller ones lie within
    larger ones, all ranks of a team have equal loads, and one load stands for them.

    Args:
        costs: of the matrices; a team's ranks share it evenly.
        sizes: of the matrices' teams, powers of two.
        length, rows: as in ``team_sizes``.

    Returns:
        The first rank of each matrix's team, counted row by row; and the load of each rank.
    """
    firsts = [0] * len(costs)
    loads = [0.0] * (length * rows)
    order = sorted(range(len(costs)), key=lambda i: (-sizes[i], -costs[i], i))
    heap: list[tuple[float, int]] = []
    size = 0
    for i in order:
        if sizes[i] != size:
            size = sizes[i]
            starts = range(0, length - size + 1, size)
            heap = [(loads[r * length + s], r * length + s) for r in range(rows) for s in starts]
            heapq.heapify(heap)
        load, first = heap[0]
        firsts[i], load = first, load + costs[i] / size
        heapq.heapreplace(heap, (load, first))
        loads[first : first + size] = [load] * size
    return firsts, loads


def _power_of_two(wanted: float, most: int) -> int:
    """Return the smallest power of two from a number on, or the largest up to ``most``."""
    size = 1
    while size < wanted and 2 * size <= most:
        size *= 2
    return size
