"""Teams: several ranks for one matrix, where there are fewer large matrices than ranks."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

SLACK = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.7, 2.0)
"""Loads that a matrix may give to each rank of its team, over what is possible, which are tried."""
ROOM = (0.85, 0.7, 0.5, 0.35, 0.25)
"""Smaller ones, tried after them: they leave room for a second matrix, and ask for larger teams."""
GAIN = 0.95
"""Teams are taken if they bring the largest load below this fraction of what it is without them."""
ROOM_GAIN = 0.9
"""The same for teams of ``ROOM``, which send more, over the best of the others."""


def team_sizes(
    able: Sequence[bool], load: Callable[[int, int], float], length: int, rows: int
) -> list[int]:
    """Return how many ranks each matrix is given: powers of two, 1 for an owner.

    Args:
        able: whether each matrix can be worked on by several ranks.
        load: from the number of a matrix and the size of its team to what each rank of it gets to
            do, in any unit.
        length: the ranks of which a team may be a part.
        rows: how many times as many ranks there are; a team lies in one row.
    """
    alone = [1] * len(able)
    powers = [1 << k for k in range(max(length, 1).bit_length())]
    loads = [
        [load(i, size) for size in (powers if fine else powers[:1])] for i, fine in enumerate(able)
    ]
    mean = sum(each[0] for each in loads) / (length * rows)
    best, best_load = alone, max(seat([x[0] for x in loads], alone, length, rows)[1], default=0.0)
    limit = GAIN * best_load
    # where sending takes time, the largest matrix may be out of reach of the mean
    least = max((min(each) for each in loads), default=0.0)
    bases = [x for x in (mean, least) if x >= mean > 0]
    for slack, base in itertools.product(SLACK + ROOM, bases):
        places = [_place(each, slack * base) for each in loads]
        sizes = [powers[k] for k in places]
        each = [x[k] for x, k in zip(loads, places, strict=True)]
        largest = max(seat(each, sizes, length, rows)[1])
        if largest < min(limit, best_load if slack >= 1 else ROOM_GAIN * best_load):
            best, best_load = sizes, largest
    return best


def seat(
    loads: Sequence[float], sizes: Sequence[int], length: int, rows: int
) -> tuple[list[int], list[float]]:
    """Give each matrix a team of ranks by longest processing time, the largest teams first.

    Teams of a size are neighbours that begin at a multiple of it, so that smaller ones lie within
    larger ones, all ranks of a team have equal loads, and one load stands for them.

    Args:
        loads: what each rank of a matrix's team gets to do.
        sizes: of the matrices' teams, powers of two.
        length, rows: as in ``team_sizes``.

    Returns:
        The first rank of each matrix's team, counted row by row; and the load of each rank.
    """
    firsts = [0] * len(loads)
    sums = [0.0] * (length * rows)
    order = sorted(range(len(loads)), key=lambda i: (-sizes[i], -loads[i], i))
    heap: list[tuple[float, int]] = []
    size = 0
    for i in order:
        if sizes[i] != size:
            size = sizes[i]
            starts = range(0, length - size + 1, size)
            heap = [(sums[r * length + s], r * length + s) for r in range(rows) for s in starts]
            heapq.heapify(heap)
        before, first = heap[0]
        firsts[i], total = first, before + loads[i]
        heapq.heapreplace(heap, (total, first))
        sums[first : first + size] = [total] * size
    return firsts, sums


def _place(loads: Sequence[float], wanted: float) -> int:
    """Return the place of the first load of at most ``wanted``, or of the least of them."""
    return next((k for k, each in enumerate(loads) if each <= wanted), loads.index(min(loads)))
