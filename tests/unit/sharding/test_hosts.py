"""Which ranks of a group share a host."""

from __future__ import annotations

import pytest

from spectral_dist.sharding.hosts import Grid, grid_of, largest_team


@pytest.mark.parametrize(
    ("ranks", "host_size", "grid"),
    [
        (range(8), 4, Grid(2, 4)),
        (range(8), 8, None),  # one host
        (range(8), 16, None),
        (range(8), 1, None),  # hosts of one rank
        (range(8), 3, None),  # hosts of 3, 3 and 2
        (range(0, 16, 2), 4, Grid(4, 2)),  # every second rank, as of two-way tensor parallelism
        (range(1, 17, 2), 4, Grid(4, 2)),
        (range(0, 32, 8), 8, None),  # one rank of each host
        (range(4, 12), 8, Grid(2, 4)),  # half of two hosts
        (range(2, 10), 8, None),  # six of one host, and two of the next
        ([0, 1, 2, 8, 9, 16], 8, None),
        ([0, 1, 4, 5, 6, 7], 4, None),
        ([1, 0, 4, 5], 4, None),  # not numbered upwards
        ([0, 4, 1, 5], 4, None),
    ],
)
def test_the_grid_of_a_group(ranks, host_size, grid):
    assert grid_of(list(ranks), host_size) == grid


@pytest.mark.parametrize(
    ("ranks", "host_size", "size"),
    [
        (range(16), 8, 8),
        (range(16), 72, 16),
        (range(12), 8, 8),  # the last four are in no team of eight
        (range(16), 3, 1),  # the ranks 2 and 3 are a team of two on two hosts
        (range(16), 6, 2),
        (range(0, 64, 2), 8, 4),
        (range(0, 64, 8), 8, 1),
        (range(4, 20), 8, 4),
        ([5], 8, 1),
    ],
)
def test_teams_within_a_host(ranks, host_size, size):
    assert largest_team(list(ranks), host_size) == size
