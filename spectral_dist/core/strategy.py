"""The strategy of each matrix of a unit: which stay in slabs, and which steps work on blocks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_dist.core.matrix_state import elements
from spectral_dist.core.teams import given_machine, machine_of, select_teams, warn_no_effect
from spectral_dist.core.units import MatrixUnit, bucket_numel, wire_dtype
from spectral_dist.polar import of_gram, resolve_dtype
from spectral_dist.rules.base import PolarSpec, Rule, Shape
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.boxes import block_layouts, slabs
from spectral_dist.sharding.cost import (
    CostContext,
    cheaper_in_slabs,
    in_slabs_if_cheaper,
    subspace_seconds,
)
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.layout import Layout, Located
from spectral_dist.sharding.plan import Plan, make_plan


def plan_of(
    rule: Rule[Any],
    options: MatrixOptions,
    located: Located,
    dtype: torch.dtype,
    is_observed: bool = False,
    host_team: int | None = None,
) -> tuple[Plan, torch.dtype]:
    """Return the plan of a unit's matrices, and the dtype in which they are sent.

    It makes no collective call, so that it serves jobs that do not run (``SimulatedGroup``) too.

    Args:
        rule: of the matrices.
        options: of the parameter group.
        located: the matrices.
        dtype: of the parameters.
        is_observed: whether any rank has observers, which need whole matrices.
        host_team: the size of the largest teams within a host, where all ranks must be asked for it
            (``teams.agreed_host_team``); None: as the group's numbers in the job say.

    Raises:
        ValueError: as in ``select_gram`` and ``select_teams``.
    """
    shapes = sorted({layout.matrix.shape for layout in located.layouts})
    specs = {shape: rule.polar(options, shape) for shape in shapes}
    wire = wire_dtype(options, list(specs.values()), dtype, located.device)
    needs_whole = is_observed or rule.pooling(options) is not None
    gram = select_gram(options, specs, located, wire, needs_whole)
    teams = select_teams(options, specs, located, wire, needs_whole, gram, host_team)
    load: Sequence[float] = teams.loads
    # if matrix state is all that the rule keeps, owners share it evenly, not the work; a few
    # numbers beside a momentum take no memory worth sharing
    if not teams.sizes and not rule.has_momentum(options):
        numel_of = {shape: elements(rule, options, shape) for shape in shapes}
        load = [numel_of[x.matrix.shape] for x in located.layouts] if any(numel_of.values()) else ()
    plan = make_plan(
        located.layouts,
        collectives.size(located.group),
        bucket_numel(options, wire),
        collectives.size(located.replicas),
        gram=gram,
        load=load,
        teams=teams.sizes,
    )
    return plan, wire


def select_gram(
    options: MatrixOptions,
    specs: Mapping[Shape, PolarSpec | None],
    located: Located,
    wire: torch.dtype,
    needs_whole: bool,
) -> list[bool]:
    """Return for each matrix whether it is orthogonalized in slabs; the same on every rank.

    Args:
        options: of the parameter group.
        specs: how the polar factors of each shape are computed.
        located: the matrices.
        wire: the dtype in which matrices are sent.
        needs_whole: whether the rule or an observer needs whole matrices, so that 'auto' must not
            choose slabs.

    Raises:
        ValueError: the strategy is 'gram', and a rule or a polar method does not work on Gram
            matrices.
    """
    layouts, ranks = located.layouts, collectives.size(located.group)
    asked = options.strategy == "gram"
    if options.strategy in ("gram", "block") and ranks == 1:
        warn_no_effect(options, layouts)
    if ranks == 1 or not (asked or (options.strategy == "auto" and not needs_whole)):
        return [False] * len(layouts)
    job = CostContext(ranks, collectives.size(located.replicas), 0, wire.itemsize, False, 8)
    if any(spec is not None and spec.rank is not None for spec in specs.values()):
        return _subspaces(options, specs, layouts, job, asked)
    dtypes: dict[Shape, torch.dtype | None] = {}
    for shape, spec in specs.items():
        try:
            dtypes[shape] = _gram_dtype(spec, wire, located.device)
        except ValueError as error:
            if asked:
                raise ValueError(f"strategy is 'gram', but {error}; or strategy='owner'") from None
            dtypes[shape] = None  # under 'auto' such matrices go to owners
    able = [dtypes[layout.matrix.shape] is not None for layout in layouts]
    if asked or not any(able):
        return able
    return cheaper_in_slabs(
        layouts, able, _job_of(job, specs, dtypes, wire, located.device), machine_of(options)
    )


def _job_of(
    job: CostContext,
    specs: Mapping[Shape, PolarSpec | None],
    dtypes: Mapping[Shape, torch.dtype | None],
    wire: torch.dtype,
    device: torch.device,
) -> CostContext:
    """Return a cost context with the steps and dtypes of polar factors filled in.

    Args:
        job: with ranks and bytes.
        specs: how the polar factors of each shape are computed; the first one that works on Gram
            matrices stands for all.
        dtypes: of the Gram matrices of each shape; None: it does not work on them.
        wire: the dtype in which matrices are sent.
        device: where matrices are computed.
    """
    spec = next(spec for shape, spec in specs.items() if dtypes[shape] is not None)
    assert spec is not None, "a Gram's dtype is a method's"
    computed = resolve_dtype(spec.method, spec.dtype, wire, device)
    widest = max(dtype.itemsize for dtype in dtypes.values() if dtype is not None)
    return replace(
        job,
        steps=of_gram.equivalent_steps(spec.method, spec.steps),
        half=computed in (torch.float16, torch.bfloat16),
        gram_itemsize=widest,
    )


def _gram_dtype(spec: PolarSpec | None, wire: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which Gram matrices must be computed and sent.

    Raises:
        ValueError: the rule or the polar method does not work on Gram matrices.
    """
    if spec is None:
        raise ValueError("this rule needs whole matrices: it names no polar factor")
    computed = resolve_dtype(spec.method, spec.dtype, wire, device)
    return of_gram.gram_dtype(spec.method, spec.steps, computed)


def _subspaces(
    options: MatrixOptions,
    specs: Mapping[Shape, PolarSpec | None],
    layouts: Sequence[Layout],
    job: CostContext,
    asked: bool,
) -> list[bool]:
    """Return ``select_gram`` for a rule that works in a subspace of each matrix.

    The subspace of a square matrix is one of the rows, so such a matrix that is cut by columns
    goes to its owner.

    Args:
        options: of the parameter group.
        specs: of each shape, with the subspace's rank.
        layouts: of the matrices.
        job: ranks and bytes.
        asked: whether the strategy is 'gram', and not 'auto'.
    """
    able = [
        slabs(x, job.ranks).along ^ x.matrix.transposed
        == int(x.matrix.read_shape[1] > x.matrix.read_shape[0])
        for x in layouts
    ]
    if asked:
        unable = [x.matrix.name for x, fine in zip(layouts, able, strict=True) if not fine]
        if unable:
            warnings.warn(
                f"strategy is 'gram', but {', '.join(unable[:3])} ({len(unable)} matrices) are"
                " square and cut by columns, where the rule's subspace is one of the rows: they"
                " are done at their owners",
                stacklevel=8,
            )
        return able
    machine = machine_of(options)

    def seconds(shape: Shape, count: int) -> tuple[float, float]:
        spec = specs[shape]
        rank = min(shape) if spec is None or spec.rank is None else spec.rank
        return subspace_seconds(shape, rank, count, job, machine)

    return in_slabs_if_cheaper(layouts, able, job.ranks, seconds)


def blocks_of(
    rule: Rule[Any], options: MatrixOptions, located: Located, plan: Plan, wire: torch.dtype
) -> tuple[Located, Plan] | None:
    """Return the blocks of a unit's matrices and their plan; None unless the strategy is 'block'.

    A block is orthogonalized in the replica that orthogonalizes its matrix, because that replica
    has the momentum, if not all have it. It makes no collective call, as ``plan_of``.

    Args:
        rule, options, located: as in ``plan_of``.
        plan, wire: what that returns.

    Raises:
        ValueError: the rule keeps state of whole matrices, or blocks are no rectangles.
    """
    ranks = collectives.size(located.group)
    if options.strategy != "block" or options.block_period == 1 or ranks == 1:
        return None
    if any(rule.state(options, layout.matrix.shape) for layout in located.layouts):
        raise ValueError(
            "strategy is 'block', but the rule keeps state of whole matrices, which blocks have"
            " not; write strategy='owner' or 'gram'"
        )
    by_matrix = [block_layouts(layout) for layout in located.layouts]
    layouts = tuple(block for matrix in by_matrix for block in matrix)
    required_replicas = [
        owner // ranks for owner, m in zip(plan.owners, by_matrix, strict=True) for _ in m
    ]
    block_plan = make_plan(
        layouts,
        ranks,
        bucket_numel(options, wire),
        collectives.size(located.replicas),
        required_replicas=required_replicas,
    )
    return replace(located, layouts=layouts), block_plan


def add_blocks(unit: MatrixUnit, rule: Rule[Any], options: MatrixOptions) -> MatrixUnit:
    """Return a unit with its ``blocks`` set, if the strategy is 'block'; a collective call.

    Args:
        unit: of whole matrices.
        rule: of the matrices.
        options: of the parameter group.

    Raises:
        ValueError: as in ``blocks_of``.
    """
    exchange = unit.exchange
    blocks = blocks_of(rule, options, unit.located, unit.plan, exchange.wire_dtype)
    if blocks is None:
        return unit
    located, plan = blocks
    block_exchange = Exchange(
        located.layouts,
        plan,
        group=located.group,
        replicas=located.replicas,
        device=located.device,
        like=torch.empty(0, dtype=exchange.state_dtype, device=exchange.state_device),
        wire_dtype=exchange.wire_dtype,
        meter=exchange.meter,
        machine=given_machine(options),
    )
    block_unit = MatrixUnit(located, plan, block_exchange, unit.has_momentum)
    return replace(unit, blocks=block_unit, period=options.block_period)


def global_step_count(unit: MatrixUnit, present: Sequence[Tensor]) -> int:
    """Return how many steps the unit has taken, this one included; the same on every rank.

    It is a collective call, for one number in every step, and waits for the device: a rank may have
    no tensor of the unit, and a count that a rank kept itself would be lost with a checkpoint that
    is loaded under another layout.

    Args:
        unit: that is stepped.
        present: the step counts of the tensors that have a gradient on this rank.
    """
    located = unit.located
    most = torch.stack(list(present)).max() if present else torch.zeros(())
    count = most.to(device=located.device, dtype=torch.float32)
    for group in (located.group, located.replicas):
        collectives.max_ranks(count, group, unit.exchange.meter)
    return int(count.item())
