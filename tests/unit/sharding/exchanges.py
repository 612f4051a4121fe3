"""Exchanges over the ranks of a test, in shards and in replicas."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.exchange import Exchange, MatrixTask
from spectral_dist.sharding.plan import make_plan

CPU = torch.device("cpu")
HOME = torch.float64  # in which directions come back


def group_here():
    return dist.group.WORLD if dist.is_initialized() else None


@cache
def grid(ranks, replicas, apart):
    """(group, replicas) of this rank; ``apart``: replicas are neighbours, ranks far apart."""
    everyone = torch.arange(ranks * replicas)
    rows = everyone.view(ranks, replicas).T if apart else everyone.view(replicas, ranks)
    found = []
    for lines, length in ((rows.tolist(), ranks), (rows.T.tolist(), replicas)):
        groups = [dist.new_group(line) if length > 1 else None for line in lines]
        where = [dist.get_rank() in line for line in lines].index(True)
        found.append(groups[where])
    return tuple(found)


def make(layouts, numel=1 << 30, wire=torch.float32, group="everyone", replicas=None):
    group = group_here() if group == "everyone" else group
    plan = make_plan(layouts, collectives.size(group), numel, collectives.size(replicas))
    meter = Meter()
    exchange = Exchange(
        layouts,
        plan,
        group=group,
        replicas=replicas,
        device=CPU,
        like=torch.empty(0, dtype=HOME),
        wire_dtype=wire,
        meter=meter,
    )
    return exchange, plan, meter


class FunctionTask(MatrixTask):
    """A task of plain functions."""

    def __init__(self, update_input, direction, apply):
        self._update_input, self._direction, self._apply = update_input, direction, apply

    def update_input(self, pieces):
        return self._update_input(pieces)

    def direction(self, matrices, which):
        return self._direction(matrices)

    def slab_direction(self, slabs, reduction):
        raise AssertionError("no matrix is in slabs")

    def apply(self, pieces, directions):
        self._apply(pieces, directions)
