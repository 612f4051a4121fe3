"""How the matrices of a unit are done: which in slabs, and block by block in which steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_dist.matrix_step import Unit
from spectral_dist.options import Options
from spectral_dist.polar import Method, of_gram, resolve_dtype
from spectral_dist.rules.root import shape_key
from spectral_dist.rules.sumo import rank_of
from spectral_dist.sharding import collectives
from spectral_dist.sharding.boxes import blocks, slabs
from spectral_dist.sharding.cost import (
    Job,
    Machine,
    cheaper_in_slabs,
    in_slabs_if_cheaper,
    subspace_seconds,
)
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.layout import Placement
from spectral_dist.sharding.plan import make_plan


def in_slabs(
    options: Options,
    group: dict[str, Any],
    placement: Placement,
    wire: torch.dtype,
    observed: bool,
) -> list[bool]:
    """Of each matrix, whether it is done under ``gram``; the same on every rank.

    observed: whether somebody wants to see whole matrices.

    Raises:
        ValueError: 'gram' was asked for, and a polar method does not work on Gram matrices.
    """
    layouts, ranks = placement.layouts, collectives.size(placement.group)
    asked = options.strategy == "gram"
    if options.strategy in ("gram", "block") and ranks == 1:
        name = layouts[0].matrix.name if layouts else "no matrix"
        warnings.warn(
            f"strategy {options.strategy!r} has no effect on {name} and those that lie like it:"
            " no other rank holds a part of them",
            stacklevel=5,
        )
    never = observed or bool(getattr(options, "adapt_every", 0))
    if ranks == 1 or not (asked or (options.strategy == "auto" and not never)):
        return [False] * len(layouts)
    if "rank" in group:
        return _subspaces(options, group, placement, wire, asked)
    found: dict[tuple[int, int], torch.dtype | None] = {}
    for shape in {layout.matrix.shape for layout in layouts}:
        try:
            found[shape] = _gram_dtype(group, shape, wire, placement.device)
        except ValueError as error:
            if asked:
                raise ValueError(f"strategy is 'gram', but {error}; or strategy='owner'") from None
            found[shape] = None
    able = [found[layout.matrix.shape] is not None for layout in layouts]
    if asked or not any(able):
        return able
    computed = _computed(group, next(iter(found)), wire, placement.device)
    widest = max((d.itemsize for d in found.values() if d is not None), default=8)
    job = Job(
        ranks,
        collectives.size(placement.replicas),
        of_gram.steps_of(*_method(group, next(iter(found)))),
        wire.itemsize,
        computed in (torch.float16, torch.bfloat16),
        widest,
    )
    return cheaper_in_slabs(layouts, able, job, Machine.from_user(options.machine or {}))


def _subspaces(
    options: Options,
    group: dict[str, Any],
    placement: Placement,
    wire: torch.dtype,
    asked: bool,
) -> list[bool]:
    """``in_slabs`` of SUMO, whose subspace is one of the rows of a square matrix."""
    layouts, ranks = placement.layouts, collectives.size(placement.group)
    able = [slabs(x, ranks).along == int(x.matrix.shape[1] > x.matrix.shape[0]) for x in layouts]
    if asked:
        unable = [x.matrix.name for x, fine in zip(layouts, able, strict=True) if not fine]
        if unable:
            warnings.warn(
                f"strategy is 'gram', but {', '.join(unable[:3])} ({len(unable)} matrices) are"
                " square and cut by columns, where SUMO's basis is one of the rows: they are done"
                " at their owners",
                stacklevel=6,
            )
        return able
    job = Job(ranks, collectives.size(placement.replicas), 0, wire.itemsize, False, 8)
    machine = Machine.from_user(options.machine or {})

    def seconds(shape: tuple[int, int], count: int) -> tuple[float, float]:
        return subspace_seconds(shape, rank_of(group, shape), count, job, machine)

    return in_slabs_if_cheaper(layouts, able, ranks, seconds)


def _method(group: dict[str, Any], shape: tuple[int, int]) -> tuple[Method, int | None]:
    """The polar method of matrices of this shape, and its steps."""
    if "polar" in group:
        return group["polar"], group["polar_steps"]
    return [group["coefficients"][shape_key(shape)]] * group["polar_steps"], None


def _computed(
    group: dict[str, Any], shape: tuple[int, int], wire: torch.dtype, device: torch.device
) -> torch.dtype:
    return resolve_dtype(_method(group, shape)[0], group["polar_dtype"], wire, device)


def _gram_dtype(
    group: dict[str, Any], shape: tuple[int, int], wire: torch.dtype, device: torch.device
) -> torch.dtype:
    return of_gram.dtype_of(*_method(group, shape), _computed(group, shape, wire, device))


def with_blocks(unit: Unit, options: Options, numel: int) -> Unit:
    """The unit; under strategy ``block`` with its blocks. A collective call.

    A block is done in the replica that does its matrix: there the momentum is, if it is not
    everywhere.
    """
    where, plan, exchange = unit.placement, unit.plan, unit.exchange
    ranks = collectives.size(where.group)
    if options.strategy != "block" or options.block_period == 1 or ranks == 1:
        return unit
    assert plan is not None
    assert exchange is not None
    found = [blocks(layout) for layout in where.layouts]
    layouts = tuple(block for some in found for block in some)
    homes = [owner // ranks for owner, some in zip(plan.owners, found, strict=True) for _ in some]
    own_plan = make_plan(layouts, ranks, numel, unit.copies, homes=homes)
    own_exchange = Exchange(
        layouts,
        own_plan,
        group=where.group,
        replicas=where.replicas,
        device=where.device,
        home=torch.empty(0, dtype=exchange.home_dtype, device=exchange.home_device),
        wire_dtype=exchange.wire_dtype,
        meter=exchange.meter,
    )
    own = Unit(replace(where, layouts=layouts), unit.tensors, own_plan, own_exchange)
    return replace(unit, blocks=own, period=options.block_period)


def steps(unit: Unit, present: Sequence[Tensor]) -> int:
    """How many steps the unit has taken, with this one; the same on every rank.

    present: the counts of the tensors that have a gradient here. Asked of all ranks in every step,
    for one number: a rank may have no tensor of the unit, and a count of its own would be lost with
    a checkpoint that is loaded under another layout. Waits for the device.
    """
    where = unit.placement
    assert unit.exchange is not None
    most = torch.stack(list(present)).max() if present else torch.zeros(())
    count = most.to(device=where.device, dtype=torch.float32)
    for group in (where.group, where.replicas):
        collectives.max_ranks(count, group, unit.exchange.meter)
    return int(count.item())
