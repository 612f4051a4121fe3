"""Which matrices of a unit several ranks share, under strategy 'split' or 'auto'."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from spectral_dist.machine import Machine
from spectral_dist.polar import of_gram, resolve_dtype, rows_of
from spectral_dist.rules.base import PolarSpec, Shape
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.cost import CostContext, split_seconds
from spectral_dist.sharding.hosts import largest_team
from spectral_dist.sharding.layout import Layout, Located
from spectral_dist.sharding.plan import cost, polynomial_cost
from spectral_dist.sharding.teams import team_sizes


@dataclass(frozen=True)
class Teams:
    """How many ranks work on each matrix of a unit, and what they get to do.

    Attributes:
        sizes: of each matrix's team; empty: all matrices have owners.
        loads: the seconds of each matrix on each rank that works on it; empty: its multiply-adds.
    """

    sizes: list[int] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)


def select_teams(
    options: MatrixOptions,
    specs: Mapping[Shape, PolarSpec | None],
    located: Located,
    wire: torch.dtype,
    needs_whole: bool,
    gram: Sequence[bool],
    host_team: int | None = None,
) -> Teams:
    """Return the teams of matrices under strategy 'split', or under 'auto' with a machine given.

    Without a machine the multiply-adds of the busiest rank are made few, with one its predicted
    seconds. Matrices that cannot be shared stay with their owners under 'auto'.

    Args:
        options: of the parameter group.
        specs: how the polar factors of each shape are computed.
        located: the matrices.
        wire: the dtype in which matrices are sent.
        needs_whole: whether the rule or an observer needs whole matrices.
        gram: whether each matrix is orthogonalized in slabs of all ranks.
        host_team: the size of the largest teams within a host; None: as the group's numbers in the
            job say.

    Raises:
        ValueError: the strategy is 'split', and the rule, its polar method or an observer needs
            whole matrices.
    """
    ranks, replicas = map(collectives.size, (located.group, located.replicas))
    if options.strategy == "split":
        _check_split(specs, needs_whole)
        if max(ranks, replicas) == 1:
            warn_no_effect(options, located.layouts)
    elif options.strategy != "auto" or options.machine is None or needs_whole:
        return Teams()
    length, rows = (ranks, replicas) if ranks > 1 else (replicas, 1)
    shapes = [layout.matrix.shape for layout in located.layouts]
    able = [
        (layout.stacked() or ranks > 1) and not in_slabs and polynomials(specs[shape]) is not None
        for layout, shape, in_slabs in zip(located.layouts, shapes, gram, strict=True)
    ]
    if length == 1 or not any(able):
        return Teams()
    if options.machine is None:
        sizes = team_sizes(able, lambda i, size: cost(shapes[i]) / size, length, rows)
        return Teams(sizes if max(sizes) > 1 else [])
    host_team = _host_team(options, located) if host_team is None else host_team
    seconds = _seconds(machine_of(options), specs, wire, located.device, host_team)

    def load(i: int, size: int) -> float:
        """Return the seconds of a matrix on each rank of its team."""
        return seconds(shapes[i], size, gram[i])

    sizes = team_sizes(able, load, length, rows)
    if max(sizes) == 1:
        return Teams()
    return Teams(sizes, [load(i, size) for i, size in enumerate(sizes)])


def agreed_host_team(options: MatrixOptions, located: Located) -> int | None:
    """Return the size of the largest teams that lie within a host in every replica.

    A collective call of the unit's ranks, if the user gave a machine; else None.

    Args:
        options: of the parameter group.
        located: the matrices.
    """
    groups = (located.group, located.replicas)
    if options.machine is None or max(map(collectives.size, groups)) == 1:
        return None
    size = _host_team(options, located)
    # replicas with other ranks may lie in hosts otherwise; all must make the same plan
    least = torch.tensor(-size, dtype=torch.int64, device=located.device)
    for group in groups:
        collectives.max_ranks(least, group, collectives.Meter())
    return -int(least)


def has_choice(options: MatrixOptions, ranks: int, replicas: int) -> bool:
    """Return whether a machine's numbers decide anything about matrices.

    Args:
        options: of the parameter group.
        ranks: the number of ranks that share matrices.
        replicas: the number of their replicas.
    """
    return ranks > 1 or (replicas > 1 and options.strategy in ("auto", "split"))


def machine_of(options: MatrixOptions) -> Machine:
    """Return the speeds that the user gave, or the defaults."""
    return Machine.from_user(options.machine or {})


def given_machine(options: MatrixOptions) -> Machine | None:
    """Return the speeds that the user gave, or None."""
    return None if options.machine is None else machine_of(options)


def warn_no_effect(
    options: MatrixOptions, layouts: Sequence[Layout], what: str | None = None
) -> None:
    """Warn that a strategy, or another option, has nothing to share out.

    Args:
        options: of the parameter group.
        layouts: of the matrices.
        what: the option; None: the strategy.
    """
    name = layouts[0].matrix.name if layouts else "no matrix"
    warnings.warn(
        f"{what or f'strategy {options.strategy!r}'} has no effect on {name} and those that lie"
        " like it: no other rank holds a part of them",
        stacklevel=8,
    )


def _check_split(specs: Mapping[Shape, PolarSpec | None], needs_whole: bool) -> None:
    """Raise a ValueError if strategy 'split' was asked for, and matrices cannot be shared."""
    if needs_whole:
        raise ValueError(
            "strategy is 'split', but an observer or the rule needs whole matrices; write"
            " strategy='owner'"
        )
    if any(polynomials(spec) is None for spec in specs.values()):
        raise ValueError(
            "strategy is 'split', but what the rule computes is no Newton-Schulz iteration on"
            " the matrix; write strategy='owner', or a polar method of polynomials"
            " (polar='polar_express')"
        )


def polynomials(spec: PolarSpec | None) -> Sequence[tuple[float, float, float]] | None:
    """Return the (a, b, c) of every step, or None if ranks cannot share what the rule computes."""
    if spec is None or spec.rank is not None:
        return None
    polynomials = rows_of(spec.method, spec.steps)
    return None if polynomials is None else polynomials[0]


def _host_team(options: MatrixOptions, located: Located) -> int:
    """Return the size of the largest teams within a host, of this rank's replica."""
    shared = located.group if collectives.size(located.group) > 1 else located.replicas
    return largest_team(collectives.job_ranks(shared), machine_of(options).host_size)


def _seconds(
    machine: Machine,
    specs: Mapping[Shape, PolarSpec | None],
    wire: torch.dtype,
    device: torch.device,
    host_team: int,
) -> Callable[[Shape, int, bool], float]:
    """Return what predicts the seconds of a matrix on each rank that works on it.

    Args:
        machine: the speeds.
        specs: how the polar factors of each shape are computed.
        wire: the dtype in which matrices are sent.
        device: where they are computed.
        host_team: the size of the largest teams within a host.

    Returns:
        A function of the shape, the size of the team, and whether the matrix is in slabs of all
        ranks, where it is the polynomial that has an owner.
    """

    @cache
    def seconds(shape: Shape, size: int, in_slabs: bool) -> float:
        spec = specs[shape]
        if spec is None or spec.rank is not None:
            return cost(shape) / machine.flops_wide
        steps = of_gram.equivalent_steps(spec.method, spec.steps)
        if in_slabs:
            return steps * polynomial_cost(shape) / machine.flops_wide
        rows = polynomials(spec)
        computed = resolve_dtype(spec.method, spec.dtype, wire, device)
        half = computed in (torch.float16, torch.bfloat16)
        job = CostContext(
            ranks=1, replicas=1, steps=steps if rows is None else len(rows),
            itemsize=wire.itemsize, half=half, gram_itemsize=4 if half else computed.itemsize,
        )  # fmt: skip
        squares = sum(c != 0 for _, _, c in rows or ())
        return split_seconds(shape, size, squares, size <= host_team, job, machine)

    return seconds
