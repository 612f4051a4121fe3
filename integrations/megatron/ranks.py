"""Megatron's process groups, as a grid of tensor-parallel times data-parallel ranks."""

from __future__ import annotations

from megatron.core import parallel_state

from spectral_dist.placement.ranks import RankGrid
from spectral_dist.sharding.collectives import Group


class MegatronRanks(RankGrid):
    """A ``RankGrid`` of one pipeline stage's ranks, or of those that hold the same experts.

    Context-parallel ranks are among the data-parallel ones.
    """

    def existing_group(self) -> Group:
        """Return Megatron's own group of the tensor- and data-parallel ranks, if it has one."""
        group: Group = parallel_state.get_tensor_and_data_parallel_group(
            check_initialized=False, with_context_parallel=True
        )
        return group
