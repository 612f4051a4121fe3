"""Parameters of a group that lie alike, and for matrices their plan and exchange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spectral_dist.core.matrix_state import MatrixState
from spectral_dist.polar import DTYPES, resolve_dtype
from spectral_dist.rules.base import PolarSpec
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import Exchange, Pieces
from spectral_dist.sharding.layout import Located
from spectral_dist.sharding.plan import Plan

ROWS = torch.contiguous_format
"""How momentum lies, also of a weight that is channels_last."""


@dataclass(frozen=True)
class Unit:
    """Parameters of a group that lie alike, and are stepped elementwise."""

    located: Located

    @property
    def tensors(self) -> tuple[int, ...]:
        """Return their indices in the group."""
        return self.located.tensors


@dataclass(frozen=True)
class MatrixUnit(Unit):
    """Parameters that hold matrices and lie alike.

    Attributes:
        plan, exchange: of their matrices.
        has_momentum: whether the rule has the shard state ``exp_avg``.
        state: what the rule keeps of them, if anything.
        blocks: under strategy 'block', the same parameters as matrices of their own block by block,
            for all steps but every ``period``-th; momentum lies the same in both.
    """

    plan: Plan
    exchange: Exchange
    has_momentum: bool
    state: MatrixState | None = None
    blocks: MatrixUnit | None = None
    period: int = 1

    def at(self, step: int) -> MatrixUnit:
        """Return what a step works on, counted from 1: this, or its blocks."""
        return self if self.blocks is None or step % self.period == 0 else self.blocks

    @property
    def has_whole_matrices(self) -> bool:
        """Return whether every matrix is whole at its owner in every step."""
        return self.blocks is None and "gram" not in self.plan.strategies

    @cached_property
    def momentum_at_owner(self) -> bool:
        """Return whether momentum is kept by the owner's replica alone."""
        copies = self.exchange.num_replicas > 1 and not self.located.replicate_momentum
        return self.has_momentum and copies

    @property
    def state_is_spread(self) -> bool:
        """Return whether there is matrix state, of which this rank may not have all."""
        ranks = map(collectives.size, (self.located.group, self.located.replicas))
        return self.state is not None and max(ranks) > 1

    @cached_property
    def names(self) -> list[str]:
        """Return the names of its matrices."""
        return [layout.matrix.name for layout in self.located.layouts]

    @cached_property
    def momentum_runs(self) -> Pieces:
        """Return this rank's runs of matrices whose momentum it keeps."""
        return self.exchange.owned_runs if self.momentum_at_owner else self.exchange.local_runs

    @cached_property
    def owned_runs(self) -> frozenset[object]:
        """Return this rank's runs of the matrices that its replica owns."""
        return frozenset(self.exchange.owned_runs.pieces)

    def new_momentum(self, index: int, weight: Tensor, local: Tensor) -> Tensor:
        """Return zeros for tensor ``index``, in float32 or wider.

        As the weight (a DTensor if it is one), but at the owner alone: the runs of its matrices one
        after the other, in the local tensor's shape if they are all of it.
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
    """Return the dtype in which matrices travel: bfloat16 if all polar factors are computed so.

    Otherwise that of momentum: float16 would overflow before it is normalised.
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
    """Return the elements that a rank works on at a time."""
    return max(1, math.floor(options.bucket_mb * 2**20 / wire.itemsize))
