"""Process groups as a grid of tensor-parallel times data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group


@dataclass(frozen=True)
class RankGrid:
    """The ranks that hold the same parameters of one pipeline stage, or the same experts.

    They are a grid: the job's rank in row t and column d has tensor-parallel rank t and
    data-parallel rank d.

    Attributes:
        tensor_group: the ranks that cut matrices into tiles; None for a single rank.
        data_group: the ranks that hold copies of each tile, or with the distributed optimizer flat
            ranges of it. Context-parallel ranks are among them. None for a single rank.
    """

    tensor_group: Group
    data_group: Group

    @property
    def tensor_size(self) -> int:
        """Return the number of tensor-parallel ranks."""
        return collectives.size(self.tensor_group)

    @property
    def data_size(self) -> int:
        """Return the number of data-parallel ranks."""
        return collectives.size(self.data_group)

    @property
    def tensor_rank(self) -> int:
        """Return this process's rank in ``tensor_group``."""
        return collectives.rank(self.tensor_group)

    @property
    def data_rank(self) -> int:
        """Return this process's rank in ``data_group``."""
        return collectives.rank(self.data_group)

    @cached_property
    def global_ranks(self) -> list[list[int]]:
        """Return [t][d]: the rank in the job of tensor rank t and data rank d.

        The first access is a collective call.
        """
        own_row = ",".join(map(str, _global_ranks_of(self.data_group)))
        rows = collectives.gather_texts(own_row, self.tensor_group)
        return [[int(r) for r in row.split(",")] for row in rows]

    @cached_property
    def joint_group(self) -> Group:
        """Return the group of all ranks of the grid. The first access is a collective call."""
        if self.tensor_size == 1:
            return self.data_group
        if self.data_size == 1:
            return self.tensor_group
        ranks = sorted(r for row in self.global_ranks for r in row)
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        existing = self.existing_group()
        if existing is not None and sorted(dist.get_process_group_ranks(existing)) == ranks:
            return existing
        new_group: Group = dist.new_group(ranks, use_local_synchronization=True)
        return new_group

    def existing_group(self) -> Group:
        """Return a group that the framework has, which may be that of all ranks of the grid."""
        return None

    @cached_property
    def joint_ranks(self) -> list[list[int]]:
        """Return [t][d]: the rank in ``joint_group`` of tensor rank t and data rank d."""
        joint_rank_of = {rank: i for i, rank in enumerate(_global_ranks_of(self.joint_group))}
        return [[joint_rank_of[r] for r in row] for row in self.global_ranks]

    @property
    def joint_rank(self) -> int:
        """Return this process's rank in ``joint_group``."""
        return collectives.rank(self.joint_group)


def group_or_none(group: Any) -> Group:
    """Return the group, or None if there is none or this process is alone in it."""
    return None if group is None or group.size() == 1 else group


def _global_ranks_of(group: Group) -> list[int]:
    """Return the ranks in the job of a group's members; a group None is this process alone."""
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
