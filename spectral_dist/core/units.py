"""Units: parameters of a group that are sharded alike, and for matrices their plan and exchange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spectral_dist.core.matrix_state import MatrixState
from spectral_dist.polar import DTYPES, resolve_dtype
from spectral_dist.rules.base import PolarSpec, Shape
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import Exchange, Pieces
from spectral_dist.sharding.layout import Located
from spectral_dist.sharding.plan import Plan

ROWS = torch.contiguous_format
"""The memory format of momentum, even of a weight that is channels_last."""


@dataclass(frozen=True)
class Unit:
    """Parameters of a group that are sharded alike, and are stepped elementwise."""

    located: Located

    @property
    def tensors(self) -> tuple[int, ...]:
        """Return the indices of the unit's parameters in the group."""
        return self.located.tensors


@dataclass(frozen=True)
class MatrixUnit(Unit):
    """Parameters that hold matrices and are sharded alike.

    Attributes:
        plan, exchange: of their matrices.
        has_momentum: whether the rule has the shard state ``exp_avg``.
        state: the matrix state, if the rule has any.
        blocks: under strategy 'block', a unit of the same parameters in which each block is a
            matrix. It is used in all steps but every ``period``-th, and shares the momentum.
        period: the steps from one step on whole matrices to the next.
        state_names: of matrix state among the states of each parameter, as state dicts have it.
    """

    plan: Plan
    exchange: Exchange
    has_momentum: bool
    state: MatrixState | None = None
    blocks: MatrixUnit | None = None
    period: int = 1
    state_names: tuple[tuple[str, ...], ...] = ()

    def at(self, step: int) -> MatrixUnit:
        """Return the unit to use in a step, this one or its blocks; steps are counted from 1."""
        return self if self.blocks is None or step % self.period == 0 else self.blocks

    @property
    def has_whole_matrices(self) -> bool:
        """Return whether every matrix is whole at its owner in every step."""
        return self.blocks is None and {"gram", "split"}.isdisjoint(self.plan.strategies)

    @cached_property
    def momentum_at_owner(self) -> bool:
        """Return whether only the owner's replica stores momentum."""
        has_replicas = self.exchange.num_replicas > 1
        return self.has_momentum and has_replicas and not self.located.replicate_momentum

    @property
    def state_is_spread(self) -> bool:
        """Return whether there is matrix state of which other ranks may store parts."""
        ranks = map(collectives.size, (self.located.group, self.located.replicas))
        return self.state is not None and max(ranks) > 1

    @cached_property
    def names(self) -> list[str]:
        """Return the names of the unit's matrices."""
        return [layout.matrix.name for layout in self.located.layouts]

    @cached_property
    def read_shapes(self) -> list[Shape]:
        """Return the shapes of the unit's matrices, as rules read them."""
        return [layout.matrix.read_shape for layout in self.located.layouts]

    @cached_property
    def momentum_runs(self) -> Pieces:
        """Return this rank's runs of the matrices whose momentum it stores."""
        return self.exchange.owned_runs if self.momentum_at_owner else self.exchange.local_runs

    @cached_property
    def owned_runs(self) -> frozenset[object]:
        """Return this rank's runs of the matrices that its replica owns."""
        return frozenset(self.exchange.owned_runs.pieces)

    def new_momentum(self, index: int, weight: Tensor, local: Tensor) -> Tensor:
        """Return zeros for the momentum of a parameter, in float32 or wider.

        It is like the weight, a DTensor if that is one. But where only the owner stores momentum,
        it has this rank's owned runs one after the other; in the local tensor's shape, if they are
        all of it.

        Args:
            index: of the parameter in the unit.
            weight: the parameter.
            local: its local tensor.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not self.momentum_at_owner:
            return torch.zeros_like(weight, dtype=dtype, memory_format=ROWS)
        numel = self.momentum_runs.numel.get(index, 0)
        if numel == local.numel():
            return torch.zeros_like(local, dtype=dtype, memory_format=ROWS)
        return local.new_zeros(numel, dtype=dtype)


def wire_dtype(
    options: MatrixOptions,
    specs: Sequence[PolarSpec | None],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.dtype:
    """Return the dtype in which matrices are sent.

    It is bfloat16 if all polar factors are computed in bfloat16; otherwise the dtype of momentum,
    as float16 would overflow before it is normalised.

    Args:
        options: of the parameter group.
        specs: of the polar factors; None: a rule has none.
        dtype: of the parameters.
        device: where matrices are computed.
    """
    if options.wire_dtype is not None:
        return DTYPES[options.wire_dtype]
    computed = {
        None if spec is None else resolve_dtype(spec.method, spec.dtype, dtype, device)
        for spec in specs
    }
    half = computed == {torch.bfloat16}
    return torch.bfloat16 if half else torch.promote_types(dtype, torch.float32)


def bucket_numel(options: MatrixOptions, wire: torch.dtype) -> int:
    """Return the most elements that a rank has of a bucket, sent in the dtype ``wire``."""
    return max(1, math.floor(options.bucket_mb * 2**20 / wire.itemsize))
