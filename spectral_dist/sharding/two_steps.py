"""An all-to-all in two steps: first among the ranks of a host, then between hosts.

In a group of H hosts with S ranks each, a rank sends H S - 1 messages in one all-to-all. In two
steps it sends S - 1 to the ranks of its host, each of which gets what is for ranks of its number in
their hosts, and H - 1 to the ranks of its own number. As many bytes go between hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from spectral_dist.machine import Machine
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter, Pending
from spectral_dist.sharding.cost import ExchangeLoad, exchange_seconds
from spectral_dist.sharding.groups import HostGroups
from spectral_dist.sharding.hosts import Grid, grid_of

Counts = Sequence[Sequence[int]]
"""The elements that a rank sends to each rank of an all-to-all, and those that it gets back."""


def faster_in_two(
    counts: Sequence[Counts],
    groups: Sequence[Group],
    itemsize: int,
    device: torch.device,
    machine: Machine,
) -> tuple[Grid | None, list[bool]]:
    """Return the grid of hosts, and whether each exchange is predicted to be faster in two steps.

    A collective call, in which all ranks get one answer: that of the slowest.

    Args:
        counts: of each exchange, to owners and back.
        groups: that of the exchanges, then that of its replicas.
        itemsize: bytes of an element.
        device: of collectives.
        machine: the speeds.
    """
    group = groups[0]
    grid = grid_of(collectives.job_ranks(group), machine.host_size)
    rank = collectives.rank(group)
    # (exchange, at once or in two steps), and whether any rank's group is no grid
    seconds = torch.zeros(len(counts) + 1, 2, dtype=torch.float64)
    seconds[-1] = grid is None
    for k, ways in enumerate(counts if grid else ()):
        for way in ways:
            assert grid is not None
            load = ExchangeLoad.of(way, rank, grid)
            seconds[k] += torch.stack(exchange_seconds(load, grid, itemsize, machine))
    seconds = seconds.to(device)
    for each in groups:
        collectives.max_ranks(seconds, each, Meter())
    *by_exchange, (no_grid, _) = seconds.tolist()
    return grid, [not no_grid and in_two < at_once for at_once, in_two in by_exchange]


class TwoSteps:
    """An all-to-all of given counts in two steps.

    Building one is a collective call of the group: ranks of a host tell each other their counts.

    Args:
        groups: in which to send.
        send_counts: the elements for each rank of the group.
        recv_counts: the elements that each rank sends to this one.
        device: of collectives.
    """

    def __init__(
        self,
        groups: HostGroups,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        device: torch.device,
    ) -> None:
        self._groups = groups
        hosts, size = groups.grid.hosts, groups.grid.size
        mine = torch.tensor(send_counts).view(hosts, size)
        theirs = mine.T.contiguous().to(device).view(-1)  # by number within the host, then host
        chunks = [hosts] * size
        told = collectives.all_to_all(theirs, chunks, chunks, groups.within, Meter()).wait()
        # of what passes through this rank: by the host's rank that it comes from, then host
        passing = told.cpu().view(size, hosts)
        self._first_counts = mine.sum(0).tolist(), passing.sum(1).tolist()
        received = torch.tensor(recv_counts).view(hosts, size).sum(1)
        self._second_counts = passing.sum(0).tolist(), received.tolist()
        self._before, self._between = _Transposed(mine), _Transposed(passing)

    def begin(self, sent: Tensor, meter: Meter) -> Pending:
        """Begin the step within hosts.

        Args:
            sent: flat, ordered by receiving rank.
            meter: counts the bytes of both steps.
        """
        ordered = self._before.reorder(sent)
        return collectives.all_to_all(ordered, *self._first_counts, self._groups.within, meter)

    def go_on(self, first: Pending, meter: Meter) -> Pending:
        """Wait for the first step, and begin the one between hosts.

        Args:
            first: what ``begin`` returned.
            meter: as for ``begin``.

        Returns:
            The flat tensor of what is received, ordered by sending rank.
        """
        ordered = self._between.reorder(first.wait())
        return collectives.all_to_all(ordered, *self._second_counts, self._groups.between, meter)


class _Transposed:
    """The order of a flat tensor's runs, of which there is one for each row and column of a table.

    Args:
        counts: (rows, columns), the elements of each run; runs come row by row, and are to come
            column by column.
    """

    def __init__(self, counts: Tensor) -> None:
        lengths = counts.flatten().tolist()
        starts = list(accumulate(lengths, initial=0))
        places = torch.arange(counts.numel()).view_as(counts).T.flatten().tolist()
        # runs without elements are left out, and those that stay neighbours are one
        runs: list[list[int]] = []
        for place in (place for place in places if lengths[place]):
            if runs and runs[-1][1] == starts[place]:
                runs[-1][1] = starts[place + 1]
            else:
                runs.append([starts[place], starts[place + 1]])
        order = sorted(range(len(runs)), key=lambda k: runs[k][0])
        self._lengths = [runs[k][1] - runs[k][0] for k in order]
        self._places = [0] * len(runs)
        for index, k in enumerate(order):
            self._places[k] = index
        self._is_in_order = order == list(range(len(runs)))

    def reorder(self, flat: Tensor) -> Tensor:
        """Return the elements in the new order."""
        if self._is_in_order:
            return flat
        runs = torch.split(flat, self._lengths)
        return torch.cat([runs[place] for place in self._places])
