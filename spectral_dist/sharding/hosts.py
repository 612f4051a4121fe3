"""Which ranks of a group share a host. A host has so many ranks of the job that follow each other.

Only numbers of ranks are needed, so jobs that do not run have hosts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Ranks of a group as equal hosts: rank ``host * size + index`` is number ``index`` of a host.

    Attributes:
        hosts: the number of hosts.
        size: the group's ranks of each host.
    """

    hosts: int
    size: int

    @property
    def ranks(self) -> int:
        """Return the number of ranks of the group."""
        return self.hosts * self.size


def grid_of(ranks: Sequence[int], host_size: int) -> Grid | None:
    """Return the grid of a group on several hosts with several of its ranks each, all equally many.

    None if there is no such grid, or if the group does not number its ranks host by host.

    Args:
        ranks: the group's ranks by their numbers in the job, in the group's order.
        host_size: the number of the job's ranks of a host.
    """
    hosts = [rank // host_size for rank in ranks]
    size = hosts.count(hosts[0])
    count, rest = divmod(len(ranks), size)
    if rest or 1 in (size, count) or list(ranks) != sorted(ranks):
        return None
    is_grid = all(len(set(hosts[i : i + size])) == 1 for i in range(0, len(hosts), size))
    return Grid(count, size) if is_grid and len(set(hosts)) == count else None


def largest_team(ranks: Sequence[int], host_size: int) -> int:
    """Return the size of the largest teams that all lie within one host: a power of two.

    Teams are neighbours of a group, from a multiple of their number on; see ``teams.seat``.

    Args:
        ranks, host_size: as in ``grid_of``.
    """
    hosts = [rank // host_size for rank in ranks]
    size = 1
    while 2 * size <= len(hosts) and all(
        len(set(hosts[i : i + 2 * size])) == 1
        for i in range(0, len(hosts) - 2 * size + 1, 2 * size)
    ):
        size *= 2
    return size
