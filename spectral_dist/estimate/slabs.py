"""Matrices in slabs: which ranks work on each, how long their slabs are, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_dist.estimate.probe import Probe
from spectral_dist.sharding.boxes import Slabs, slabs
from spectral_dist.sharding.layout import Layout, Tile
from spectral_dist.sharding.plan import Bucket, first_of


@dataclass(frozen=True, eq=False)
class Team:
    """The ranks that work on one matrix in slabs: under ``gram`` all of a replica.

    Attributes:
        ranks: of the team, counted replica by replica.
        owner: the place in the team of the matrix's owner.
        cut: how the matrix is cut into slabs.
        members: the ranks of the team as ``cut`` counts them: of a replica, or replicas if each has
            one rank.
        is_split: whether the strategy is ``split``, so that the team shares all products.
    """

    ranks: range
    owner: int
    cut: Slabs
    members: range
    is_split: bool

    @classmethod
    def of(cls, bucket: Bucket, layout: Layout, owner: int, ranks: int, replicas: int) -> Team:
        """Return the team of a matrix.

        Args:
            bucket: that the matrix is in.
            layout: of the matrix.
            owner: of the matrix.
            ranks: the number of ranks of a replica.
            replicas: the number of replicas.
        """
        is_split = bucket.team > 1
        size = bucket.team if is_split else ranks
        first, length = first_of(owner, ranks, size), ranks if ranks > 1 else replicas
        members = range(first % length, first % length + size)
        cut = slabs(layout, length, members if is_split else None)
        return cls(range(first, first + size), owner - first, cut, members, is_split)

    @property
    def lengths(self) -> Tensor:
        """Return the number of rows or columns of each member's slab."""
        return slab_lengths(self.cut, self.members)

    def of_ranks(self, values: Tensor) -> Tensor:
        """Return a view of what the team's ranks have, of values (replicas, ranks of a replica)."""
        return values.view(-1)[self.ranks.start : self.ranks.stop]


class MemberCounts(NamedTuple):
    """What each member of a team takes for a matrix, as ``Probe`` has it of one."""

    flops: Tensor
    polar_calls: Tensor
    work_bytes: Tensor
    sent_bytes: Tensor
    wide_flops: Tensor
    touched_bytes: Tensor
    operators: Tensor
    collectives: Tensor


def member_counts(
    team: Team, shape: tuple[int, int], probe: Callable[[int, bool], Probe]
) -> MemberCounts:
    """Return what each member of a team takes for a matrix.

    Members whose slabs, and rows of the Gram matrix, are equally long take the same, but for the
    owner: one of each kind is probed.

    Args:
        team: of the matrix.
        shape: of the matrix.
        probe: from the place of a member that has the key of a kind, and whether it is the owner.
    """
    places, kind_of = _kinds(team.cut, team.members, team.is_split, min(shape))
    probes = [probe(place, False) for place in places]
    at_owner = probe(places[int(kind_of[team.owner])], True)
    counted = []
    for name in MemberCounts._fields:
        values = torch.tensor([getattr(one, name) for one in probes])[kind_of]
        values[team.owner] = getattr(at_owner, name)
        counted.append(values)
    return MemberCounts(*counted)


@lru_cache(maxsize=1024)
def _kinds(cut: Slabs, members: range, is_split: bool, side: int) -> tuple[list[int], Tensor]:
    """Return the first member of each kind of members that take the same, and the kind of each.

    Args:
        cut, members, is_split: of the team.
        side: the short one of the matrix.
    """
    lengths = slab_lengths(cut, members)
    kinds = lengths * (side + 1) + row_counts(side, len(lengths)) * is_split
    values, kind_of = torch.unique(kinds, return_inverse=True)
    last = torch.full_like(values, len(kinds))
    places = last.scatter_reduce(0, kind_of, torch.arange(len(kinds)), "amin")
    return places.tolist(), kind_of


@lru_cache(maxsize=1024)
def row_counts(side: int, ranks: int) -> Tensor:
    """Return how many rows of a Gram matrix each rank of a team computes."""
    return (side * torch.arange(ranks + 1) // ranks).diff()


@lru_cache(maxsize=1024)
def slab_lengths(cut: Slabs, members: range | None = None) -> Tensor:
    """Return the number of rows or columns of each rank's slab.

    Args:
        cut: the slabs.
        members: the ranks; None: all.
    """
    ranks = range(cut.ranges.ranks) if members is None else members
    return torch.tensor([end - begin for begin, end in map(cut.ranges.__getitem__, ranks)])


@lru_cache(maxsize=4096)
def shares(storage: tuple[Tile, ...]) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Return the ranks that store a part of a matrix, their numbers of elements, and both by rank.

    Args:
        storage: ``Layout.storage()``.
    """
    numel_of: dict[int, int] = {}
    for tile in storage:
        for rank, begin, end in tile.parts():
            numel_of[rank] = numel_of.get(rank, 0) + end - begin
    return torch.tensor(list(numel_of)), torch.tensor(list(numel_of.values())), numel_of


@lru_cache(maxsize=1024)
def kept_in_slabs(storage: tuple[Tile, ...], cut: Slabs, members: range | None = None) -> Tensor:
    """Return, by rank, the elements that it stores of a matrix and that are in its own slab.

    Args:
        storage: ``Layout.storage()``.
        cut: the slabs.
        members: the ranks; None: all.
    """
    ranks = range(cut.ranges.ranks) if members is None else members
    return _in_ranges(storage, cut.along, ranks, [cut.ranges[rank] for rank in ranks])


@lru_cache(maxsize=4096)
def stored_in_slab(storage: tuple[Tile, ...], cut: Slabs, rank: int, ranks: int) -> Tensor:
    """Return the elements of one rank's slab that each rank stores, float64 (ranks,).

    Args:
        storage: ``Layout.storage()``.
        cut: the slabs.
        rank: whose slab.
        ranks: their number.
    """
    slab = cut.ranges[rank]
    return _in_ranges(storage, cut.along, range(ranks), [slab] * ranks).double()


def _in_ranges(
    storage: tuple[Tile, ...], along: int, ranks: range, ranges: Sequence[tuple[int, int]]
) -> Tensor:
    """Return, by rank, the elements that it stores of a matrix within its range.

    Args:
        storage: ``Layout.storage()``.
        along: 0 for ranges of rows, 1 for columns.
        ranks: the ranks.
        ranges: [begin, end) of each.
    """
    edges = torch.tensor(ranges)
    found = torch.zeros(len(ranks), dtype=torch.int64)
    for tile in storage:
        parts = torch.tensor([tile.part(rank) for rank in ranks])
        first, size = (tile.col, tile.cols) if along else (tile.row, tile.rows)
        low, high = (edges - first).clamp(0, size).unbind(1)
        below = _below(parts, tile, low, high, along)
        found += below[:, 1] - below[:, 0]
    return found


def _below(edges: Tensor, tile: Tile, low: Tensor, high: Tensor, along: int) -> Tensor:
    """Count the elements of a tile before each edge that are in a range of rows or columns.

    Args:
        edges: (n, 2) of row-major elements.
        tile: the tile.
        low, high: the range of each, (n,).
        along: 0 for rows, 1 for columns.
    """
    low, high = low[:, None], high[:, None]
    if not along:
        return edges.clamp(low * tile.cols, high.maximum(low) * tile.cols)
    rows, rest = edges // tile.cols, edges % tile.cols
    return rows * (high - low) + (rest - low).clamp(min=0).minimum(high - low)
