"""Megatron's process groups, as a tensor-parallel x data-parallel grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold the same parameters of one pipeline stage (or the same experts).

    ``tensor_group`` cuts matrices into tiles; ``data_group`` (context-parallel ranks included)
    holds copies of each tile, or with the distributed optimizer flat ranges of it.
    """

    tensor_group: Group
    data_group: Group

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return collectives.size(self.tensor_group)

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return collectives.size(self.data_group)

    @property
    def tensor_rank(self) -> int:
        """This rank's number among tensor-parallel ranks."""
        return collectives.rank(self.tensor_group)

    @property
    def data_rank(self) -> int:
        """This rank's number among data-parallel ranks."""
        return collectives.rank(self.data_group)

    @cached_property
    def grid(self) -> list[list[int]]:
        """[t][d]: the job's rank number of data-parallel rank d of tensor-parallel rank t.

        A collective call, once.
        """
        mine = ",".join(map(str, _members(self.data_group)))
        rows = collectives.gather_texts(mine, self.tensor_group)
        return [[int(r) for r in row.split(",")] for row in rows]

    @cached_property
    def both(self) -> Group:
        """The group of all of them. A collective call, once."""
        if self.tensor == 1:
            return self.data_group
        if self.data == 1:
            return self.tensor_group
        ranks = sorted(r for row in self.grid for r in row)
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        known = parallel_state.get_tensor_and_data_parallel_group(
            check_initialized=False, with_context_parallel=True
        )
        if known is not None and sorted(dist.get_process_group_ranks(known)) == ranks:
            group: dist.ProcessGroup = known
            return group
        made: Group = dist.new_group(ranks, use_local_synchronization=True)
        return made

    @cached_property
    def numbers(self) -> list[list[int]]:
        """[t][d]: as ``grid``, but the rank's number in ``both``."""
        place = {rank: i for i, rank in enumerate(_members(self.both))}
        return [[place[r] for r in row] for row in self.grid]

    @property
    def number(self) -> int:
        """This rank's number in ``both``."""
        return collectives.rank(self.both)


def alone(group: Any) -> Group:
    """The group, or None if it is of this rank only."""
    return None if group is None or group.size() == 1 else group


def _members(group: Group) -> list[int]:
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
