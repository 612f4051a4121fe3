"""Parameters that are sharded alike, on all ranks of a job that does not run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_dist.estimate.job import Job
from spectral_dist.sharding.collectives import Group, SimulatedGroup, size
from spectral_dist.sharding.hosts import largest_team
from spectral_dist.sharding.layout import Located


@dataclass(frozen=True)
class PlacedUnit:
    """Parameters of a group that are sharded alike.

    Of several sets of ranks whose own parameters lie alike, as Megatron's stages and experts do,
    one unit stands for all.

    Attributes:
        located: their layouts; its groups are simulated ones.
        stored: by rank of ``located.group``: the elements that it stores.
        num_tensors: by rank of ``located.group``: the number of tensors that it steps.
        rank_of, replica_of: by rank of the job: its rank in the group, and which replica it is in;
            -1: it has none of the parameters.
        dtype: of the tensors that are stepped.
    """

    located: Located
    stored: Tensor
    num_tensors: Tensor
    rank_of: Tensor
    replica_of: Tensor
    dtype: torch.dtype

    @property
    def by_job_rank(self) -> Tensor:
        """Return the elements that each rank of the job stores."""
        return self.spread(self.stored)

    @property
    def job_rank_of(self) -> Tensor:
        """Return the rank of the job by (replica, rank of the group); of several sets the first."""
        located = self.located
        numbers = torch.zeros(size(located.replicas), size(located.group), dtype=torch.int64)
        members = (self.rank_of >= 0).nonzero().flatten().flip(0)
        numbers[self.replica_of[members], self.rank_of[members]] = members
        return numbers

    def host_team(self, host_size: int) -> int:
        """Return the size of the largest teams that lie within a host in every replica.

        Args:
            host_size: the number of the job's ranks of a host.
        """
        numbers = self.job_rank_of
        rows = numbers if numbers.shape[1] > 1 else numbers.T
        return min(largest_team(row, host_size) for row in rows.tolist())

    def spread(self, values: Tensor) -> Tensor:
        """Return for each rank of the job what it has of values, 0 if it is not in the unit.

        Args:
            values: (replicas, ranks of the group), or what expands to that.
        """
        located = self.located
        values = values.expand(size(located.replicas), size(located.group))
        return values[self.replica_of, self.rank_of] * (self.rank_of >= 0)


def simulated(ranks: int) -> Group:
    """Return a group of so many ranks, none of which runs; None for one."""
    return SimulatedGroup(0, ranks) if ranks > 1 else None


def state_dtype(job: Job) -> torch.dtype:
    """Return the dtype of the tensors that the optimizer steps on."""
    has_masters = job.zero_stage is not None or job.engine == "megatron"
    return torch.float32 if has_masters else job.dtype
