"""What the ranks agree on before a step changes anything: one number, and more if it differs.

A rank that finds something wrong, or something other than what was agreed last, sends 1 in place of
0. Then every rank knows that one did, all send a report, and all decide the same.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spectral_dist.core.finite import BAD, NEWS
from spectral_dist.core.units import Unit
from spectral_dist.rules.fields import plain, specs_of
from spectral_dist.rules.options import BaseOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group

STRIDED = torch.strided
Grads: TypeAlias = Sequence[Tensor | None]
"""The gradients of a unit's tensors, None where there is none."""


@dataclass(frozen=True)
class Status:
    """What one rank has found before a step; by default nothing that the others need to know.

    Attributes:
        missing: parameters without a gradient on this rank, of which other ranks may have one.
        has_absent: whether any parameter has no gradient on this rank.
        lacks_gradients: whether this rank has parameters, and none has a gradient.
        monitor_every: the period of this rank's monitor, 0 without one.
        is_observed: whether there are observers.
    """

    missing: tuple[str, ...] = ()
    has_absent: bool = field(default=False, compare=False)
    lacks_gradients: bool = False
    monitor_every: int = 0
    is_observed: bool = False


@dataclass
class Agreement:
    """What the ranks have agreed on.

    Attributes:
        status: of this rank when they agreed last.
        monitor_every: the period of the monitor that any rank has.
        is_observed: whether any rank has observers.
        has_gradients: whether any rank has a gradient.
        is_made: whether the ranks have agreed on a step yet.
    """

    status: Status = Status()
    monitor_every: int = 0
    is_observed: bool = False
    has_gradients: bool = True
    is_made: bool = False


@dataclass
class RankReport:
    """One rank's status and the errors that it found, as they are sent to the others.

    Attributes:
        rank: of the job.
        steps: the number of steps that were taken before.
        missing, lacks_gradients, monitor_every, is_observed: as in ``Status``.
        options: of each parameter group, as ``option_lines`` says them after the group's name.
        bad: parameters with a gradient that is not finite.
        error: "Type\nmessage" of an error of this rank, or empty.
    """

    rank: int
    steps: int
    missing: list[str]
    lacks_gradients: bool
    monitor_every: int
    is_observed: bool
    options: list[list[str]]
    bad: list[str] = field(default_factory=list)
    error: str = ""


def without_gradient(units: Sequence[Unit], grads: Sequence[Grads]) -> list[str]:
    """Return the names of parameters without a gradient; ``grads``: those of each unit."""
    return [
        name
        for unit, unit_grads in zip(units, grads, strict=True)
        if any(grad is None for grad in unit_grads)
        for name, index, _, _ in unit.located.spans
        if unit_grads[index] is None
    ]


def missing(units: Sequence[Unit], grads: Sequence[Grads]) -> list[str]:
    """Return the names of parameters without a gradient that other ranks have as well."""
    shared = [
        (unit, unit_grads)
        for unit, unit_grads in zip(units, grads, strict=True)
        if max(map(collectives.size, (unit.located.group, unit.located.replicas))) > 1
    ]
    return without_gradient([unit for unit, _ in shared], [g for _, g in shared])


def with_gradient(absent: Container[str], units: Sequence[Unit], names: Iterable[str]) -> list[str]:
    """Return those of some parameters that have a gradient on this rank.

    Args:
        absent: the names of all that have none.
        units: that are stepped.
        names: of the parameters that are asked for.
    """
    wanted = set(names)
    held = [name for unit in units for name, _, _, _ in unit.located.spans]
    return [name for name in held if name in wanted and name not in absent]


def names_by_gradient(units: Sequence[Unit], grads: Sequence[Grads]) -> list[list[str]]:
    """Return the parameters in each gradient of this rank that is not None and not empty."""
    names = []
    for unit, unit_grads in zip(units, grads, strict=True):
        by_index: dict[int, list[str]] = {}
        for name, index, _, _ in unit.located.spans:
            by_index.setdefault(index, []).append(name)
        names += [
            by_index.get(index, [])
            for index, grad in enumerate(unit_grads)
            if grad is not None and grad.numel()
        ]
    return names


def check_dense(units: Sequence[Unit], grads: Sequence[Grads]) -> None:
    """Raise a ValueError for a sparse gradient, which neither AdamW nor any rule could take."""
    for unit, unit_grads in zip(units, grads, strict=True):
        sparse = [i for i, g in enumerate(unit_grads) if g is not None and g.layout is not STRIDED]
        for name, index, _, _ in unit.located.spans if sparse else ():
            if index in sparse:
                layout = unit_grads[index].layout  # type: ignore[union-attr]
                raise ValueError(
                    f"the gradient of {name} is sparse ({layout}), which is not supported;"
                    " write nn.Embedding(..., sparse=False)"
                )


def status_of(
    units: Sequence[Unit], grads: Sequence[Grads], monitor_every: int, is_observed: bool
) -> Status:
    """Return this rank's status before a step.

    Args:
        units: that are stepped.
        grads: of each unit's tensors.
        monitor_every: the period of this rank's monitor, 0 without one.
        is_observed: whether this rank has observers.
    """
    all_grads = [grad for unit_grads in grads for grad in unit_grads]
    has_absent = any(grad is None for grad in all_grads)
    lacks = has_absent and all(grad is None for grad in all_grads)
    absent = tuple(missing(units, grads)) if has_absent else ()
    return Status(absent, has_absent, lacks, monitor_every, is_observed)


def report_of(
    status: Status,
    steps: int,
    options: list[list[str]],
    bad: list[str],
    error: Exception | None,
) -> RankReport:
    """Return the report that this rank sends to the others.

    Args:
        status: of this rank.
        steps: the number of steps that were taken before.
        options: of each parameter group, after the group's name.
        bad: parameters with a gradient that is not finite.
        error: of this rank.
    """
    return RankReport(
        collectives.job_rank(),
        steps,
        list(status.missing),
        status.lacks_gradients,
        status.monitor_every,
        status.is_observed,
        options,
        bad,
        "" if error is None else f"{type(error).__name__}\n{error}",
    )


def option_lines(name: str, options: BaseOptions, group: Mapping[str, object]) -> list[str]:
    """Return lines that are equal on ranks with the same optimizer and options of a group.

    Args:
        name: of the optimizer.
        options: of the optimizer.
        group: the parameter group.
    """
    specs = specs_of(type(options))
    of_optimizer = [option for option, spec in specs.items() if spec.scope == "optimizer"]
    return [
        f"optimizer {name}",
        *(f"{option} {getattr(options, option)!r}" for option in of_optimizer),
        *group_lines(type(options), group),
    ]


def group_lines(options: type[BaseOptions], group: Mapping[str, object]) -> list[str]:
    """Return the options that a group carries, a line for each."""
    names = sorted({*options.names(str(group["kind"])), "lr_ratio"} & group.keys())
    return [f"{name} {plain(group[name])!r}" for name in names]


def number_of(lines: Sequence[Sequence[str]], missing: Sequence[str] = ()) -> int:
    """Return a number below 2^24 that differs, but for a chance of 1 in 2^24, where arguments do.

    Args:
        lines: the options of each group.
        missing: the parameters without a gradient.
    """
    return zlib.crc32(repr((lines, missing) if missing else lines).encode()) >> 8


def level_of(norms: Tensor | None, has_error: bool, has_news: bool, device: torch.device) -> Tensor:
    """Return what this rank tells the others before a step: 0, ``NEWS`` or ``BAD``, 0-d float32.

    Args:
        norms: numbers that are all finite exactly if this rank's gradients are; None: there are
            none, or they are not looked at.
        has_error: whether this rank has an error.
        has_news: whether this rank has another status than was agreed on.
        device: of the result.
    """
    known = BAD if has_error else NEWS if has_news else 0.0
    level = torch.full((), known, device=device)
    if norms is None:
        return level
    # not torch.where: a GPU would get its number by a copy that waits
    return level.masked_fill(~norms.isfinite().all().to(device), BAD)


def check_without_agreement(
    error: Exception | None, status: Status, agreed: Status, warned: set[str]
) -> None:
    """Check only this rank, by what was agreed in the first step, as check_finite=False has it.

    Args:
        error: of this rank, which is raised.
        status: of this rank.
        agreed: this rank's status in the first step.
        warned: the warnings that were given, to which this adds its own.
    """
    if error is not None:
        raise error
    watched, before = ((s.monitor_every, s.is_observed) for s in (status, agreed))
    # a warning, because an error would be raised on this rank only
    if watched != before and "monitor" not in warned:
        warned.add("monitor")
        warnings.warn(
            "a monitor or an observer was set or removed after the first step, which has no"
            " effect: with check_finite=False ranks agree on them in the first step only; set"
            " it before, or leave check_finite on",
            stacklevel=6,
        )


def agree(
    agreement: Agreement,
    report: RankReport,
    with_gradient: Callable[[Iterable[str]], list[str]],
    groups: Sequence[Group],
) -> None:
    """Gather the reports of all ranks, and update the agreement or raise; a collective call.

    Args:
        agreement: which is updated.
        report: of this rank.
        with_gradient: from names of parameters to those that have a gradient on this rank.
        groups: that span the ranks, one after the other.

    Raises:
        ValueError: on every rank, if any has an error or a bad gradient, or if they differ.
    """
    reports = [RankReport(**content) for content in _gathered(asdict(report), groups)]
    failed = [r for r in reports if r.error]
    if failed:
        kind, message = failed[0].error.split("\n", 1)
        on_rank = f" (on rank {failed[0].rank})" if len(failed) < len(reports) else ""
        raise collectives.ERRORS.get(kind, ValueError)(f"{message}{on_rank}")
    _check_options(reports)
    _check_finite(reports)
    if any(not r.lacks_gradients for r in reports):
        _check_presence(reports)
        missing = {name: r.rank for r in reports for name in r.missing}
        if missing:
            content = {"rank": report.rank, "names": with_gradient(missing)}
            _check_missing(missing, _gathered(content, groups))
    elif not max(r.steps for r in reports):
        raise ValueError(
            "no parameter has a gradient; call backward() before step(), and zero_grad() after"
            " (or was the model wrapped or sharded after param_groups(model)?)"
        )
    periods = sorted({r.monitor_every for r in reports} - {0})
    if len(periods) > 1:
        raise ValueError(
            f"the monitor's every is {periods[0]} on one rank and {periods[1]} on another; give it"
            " one value, or set the monitor on rank 0 alone"
        )
    agreement.monitor_every = periods[0] if periods else 0
    agreement.is_observed = any(r.is_observed for r in reports)
    agreement.has_gradients = any(not r.lacks_gradients for r in reports)


def _gathered(content: dict[str, Any], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return what every rank of the groups has, sent as JSON; a collective call."""
    return [json.loads(text) for text in collectives.gather_all(json.dumps(content), groups)]


def _check_options(reports: Sequence[RankReport]) -> None:
    """Raise a ValueError for the first group or option that differs between ranks."""
    first = reports[0]
    for report in reports:
        names, other_names = ([lines[0] for lines in r.options] for r in (first, report))
        if names != other_names:
            raise ValueError(
                f"the parameter groups begin with {', '.join(names)} on rank {first.rank}, but with"
                f" {', '.join(other_names)} on rank {report.rank}; add the same groups on every"
                " rank"
            )
        for lines, others in zip(first.options, report.options, strict=True):
            for line, other in zip(lines, others, strict=True):
                if line != other:
                    name, value = line.split(" ", 1)
                    raise ValueError(
                        f"{name} of the group of {lines[0]} is {value} on rank {first.rank}, but"
                        f" {other.removeprefix(name).lstrip()} on rank {report.rank}, so the step"
                        " would differ between ranks; write the same on every rank (and step its"
                        " scheduler on all)"
                    )


def _check_finite(reports: Sequence[RankReport]) -> None:
    """Raise a ValueError if a gradient of any rank is not finite."""
    bad = list(dict.fromkeys(name for r in reports for name in r.bad))
    if bad:
        shown = ", ".join(bad[:5]) + f" and {len(bad) - 5} more" * (len(bad) > 5)
        raise ValueError(
            f"the gradient of {shown} is NaN or infinite, and was not applied. Look for the"
            " cause (lr, data, fp16 without loss scaling); check_finite=False turns this check"
            " off"
        )


def _check_presence(reports: Sequence[RankReport]) -> None:
    """Raise a ValueError if some ranks have gradients, and others have none at all."""
    without = [r.rank for r in reports if r.lacks_gradients]
    if without:
        other = next(r.rank for r in reports if not r.lacks_gradients)
        raise ValueError(
            f"no parameter has a gradient on rank {without[0]}, but some have on rank {other}, so"
            " the step would differ between ranks; call backward() on every rank before step()"
        )


def _check_missing(missing: Mapping[str, int], present: Sequence[dict[str, Any]]) -> None:
    """Raise a ValueError for a parameter that has a gradient on some ranks only.

    Args:
        missing: the rank on which each parameter has no gradient.
        present: {"rank": of a rank, "names": of those parameters that have a gradient there}.
    """
    for content in present:
        for name in content["names"]:
            raise ValueError(
                f"{name} has no gradient on rank {missing[name]}, but has one on rank"
                f" {content['rank']}, so the step would differ between ranks; use it in every"
                " rank's loss (or let DistributedDataParallel find unused parameters), or freeze it"
            )
