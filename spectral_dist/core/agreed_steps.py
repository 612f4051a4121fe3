"""Whether a step is taken: what the ranks decide together before it changes anything."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

import torch

from spectral_dist._error_help import explained
from spectral_dist._host_copy import HostCopy
from spectral_dist.core import agreement as agreeing
from spectral_dist.core import finite
from spectral_dist.core.agreement import Agreement, Grads, RankReport, Status
from spectral_dist.core.finite import LastStep
from spectral_dist.core.matrix_ops import Observer
from spectral_dist.core.monitor import Monitor
from spectral_dist.core.rates import Rates
from spectral_dist.core.units import Unit
from spectral_dist.core.written_options import WrittenOptions
from spectral_dist.placement.base import ParamGroup
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter

Work: TypeAlias = Sequence[tuple[ParamGroup, Unit]]
"""The units that a step is taken on, each with its parameter group."""


class AgreedSteps(Rates):
    """The part of ``ShardedOptimizer`` that decides with the other ranks whether a step is taken.

    On CPUs, in the first step, and in steps that the monitor reports the host knows before anything
    changes. In other steps on a GPU a flag on the device guards all that the step writes, and the
    host reads it when the next step begins, so that it never waits for the backward pass.

    Attributes:
        observers, monitor, checks, meter: see ``ShardedOptimizer``.
    """

    observers: list[Observer]
    checks: list[Callable[[], None]]
    monitor: Monitor | None
    meter: Meter
    _agreement: Agreement
    _written: WrittenOptions
    _last_step: LastStep | None
    _is_failing: bool
    _look_back: Callable[[], None]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Return the device on which matrices are computed and collectives run."""

    @abstractmethod
    def steps_taken(self) -> int:
        """Return the largest number of steps in this rank's states."""

    @abstractmethod
    def check_group(self, group: ParamGroup) -> None:
        """Raise a ValueError for a bad option that something has written into a group."""

    @abstractmethod
    def check_observers(self) -> None:
        """Raise a ValueError if there are observers, but no whole matrices to show them."""

    def can_skip(self) -> bool:
        """Return whether a flag on the device can keep a step from changing anything."""
        return True

    def is_reported(self) -> bool:
        """Return whether the host must know about the coming step before it is taken.

        The same on every rank.
        """
        every = self._agreement.monitor_every
        return self._agreement.is_observed or bool(every and (self.steps_taken() + 1) % every == 0)

    @explained
    def check_last_step(self) -> None:
        """Raise the error of the last step, if that was skipped and the host has not looked yet.

        A collective call of the ranks that train the model together; on CPUs there is nothing to
        do. ``step`` begins with it, and so do a merge of POET's and ``checkpoint.save``. Call it
        after the last step of a training on GPUs that saves nothing.

        Raises:
            ValueError: on every rank, if a gradient was NaN or infinite in the last step, or if
                ranks differed. The last step has changed nothing.
        """
        if self._last_step is not None:
            self._look_back()

    def forget_last_step(self) -> None:
        """Forget the last step, whose flag no longer matters: its results are replaced."""
        self._last_step = None

    def refuse_skipped_step(self) -> None:
        """Raise a ValueError if the last step was skipped, without asking other ranks."""
        if self._last_step is not None and self._last_step.read()[1]:
            raise ValueError(
                "the last step was not applied, because on some rank a gradient is NaN or infinite,"
                " or ranks differ; call optimizer.check_last_step() on every rank, which says what"
                " was wrong"
            )

    def _agree(self, work: Work, grads: Sequence[Grads]) -> bool:
        """Agree with the other ranks on the step; return whether it is to be taken.

        Afterwards ``_last_step`` is None if the host knows that the step is good. Otherwise its
        ``skip`` guards what the step writes, and a rank with ``_is_failing`` takes part in it with
        no gradient and with the options that were good before.
        """
        self.check_last_step()
        groups, known = self.placement.world_groups(), self._agreement
        units = [unit for _, unit in work]
        error = self._first_error(units, grads)
        self._is_failing = error is not None
        if error is None:
            self.warn_of_one_lr()
        status = agreeing.status_of(
            units, grads, self.monitor.every if self.monitor else 0, bool(self.observers)
        )
        check = self.options.check_finite
        if not check and known.is_made:
            agreeing.check_without_agreement(error, status, known.status, self._warned)
            return True
        alone = all(collectives.size(group) == 1 for group in groups)
        if error is not None and alone:
            raise error
        dense = check and error is None  # after an error, gradients may be sparse
        present = [g for gs in grads for g in gs if g is not None and g.numel()] * dense
        device = work[0][1].located.device if work else self.device
        later = check and known.is_made and self._looks_later(device, grads)
        norms = finite.norms_of(present, each=later)
        level = agreeing.level_of(norms, error is not None, status != known.status, device)
        options = self._option_lines()
        number = agreeing.number_of(options, status.missing if later else ())
        flags = collectives.compare(level, number, groups, self.meter if check else Meter())
        absent = set(agreeing.without_gradient(units, grads)) if status.has_absent else set()
        report = partial(self._report_of, status, options, error)
        with_gradient = partial(agreeing.with_gradient, absent, units)
        if later:
            names = agreeing.names_by_gradient(units, grads) if dense else []
            last = LastStep(finite.skip_flag(flags), HostCopy(flags), norms, names)
            self._look_later(last, status, report, with_gradient)
            return not (alone and status.lacks_gradients)
        raised, largest, smallest = flags.tolist()
        if raised or largest != -smallest:
            bad = finite.not_finite(units, grads) if dense else []
            agreeing.agree(known, report(bad), with_gradient, groups)
            known.status = status
        known.is_made = True
        if not known.has_gradients:
            self._warn_of_no_gradient()
        return known.has_gradients

    def _looks_later(self, device: torch.device, grads: Sequence[Grads]) -> bool:
        """Return whether the host reads the flag of the coming step when the next one begins."""
        if device.type not in finite.LATER_ON or not self.can_skip() or self.is_reported():
            return False
        return all(g is None or g.device == device for gs in grads for g in gs)

    def _look_later(
        self,
        last: LastStep,
        status: Status,
        report: Callable[[list[str]], RankReport],
        with_gradient: Callable[[Iterable[str]], list[str]],
    ) -> None:
        """Keep what is needed to say, when the next step begins, what was wrong with this one.

        Args:
            last: the step.
            status: of this rank in it.
            report: from the parameters whose gradient was not finite to this rank's report.
            with_gradient: as ``agree`` takes it.
        """
        if status.lacks_gradients:
            self._warn_of_no_gradient()
        groups, known = self.placement.world_groups(), self._agreement

        def look_back() -> None:
            """Read the flag; if a rank had something to say, let all ranks say it."""
            self._last_step = None
            has_news, was_skipped = last.read()
            if was_skipped:
                last.take_back()
            if not has_news:
                return
            try:
                agreeing.agree(known, report(last.bad_names()), with_gradient, groups)
                if was_skipped:
                    raise ValueError(
                        "ranks differ in which of their parameters have a gradient, so the step"
                        " was not applied; call backward() on every rank before step()"
                    )
            except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
                applied = "not applied" if was_skipped else "applied"
                error.args = (f"in the last step, which was {applied}: {error}",)
                raise
            known.status = status

        self._last_step, self._look_back = last, look_back

    def _report_of(
        self, status: Status, options: list[list[str]], error: Exception | None, bad: list[str]
    ) -> RankReport:
        """Return what this rank says of a step to the others."""
        steps = 0 if error else self.steps_taken()  # a bad option may affect the count
        return agreeing.report_of(status, steps, options, bad, error)

    def _warn_of_no_gradient(self) -> None:
        """Warn, once, of a step that changes nothing."""
        if "step" not in self._warned:
            self._warned.add("step")
            warnings.warn("no parameter has a gradient, so this step changes nothing", stacklevel=5)

    def _option_lines(self) -> list[list[str]]:
        """Return the checked options of each group, after the name of its first parameter."""
        return [
            [self.routes[group["id"]][0].name, *self._written.lines(group)]
            for group in self.param_groups
            if self.routes[group["id"]]
        ]

    def _first_error(self, units: Sequence[Unit], grads: Sequence[Grads]) -> Exception | None:
        """Return the first error that this rank finds before a step, without asking others."""
        try:
            agreeing.check_dense(units, grads)
            for group in self.param_groups:
                self.check_group(group)
            for check in self.checks:
                check()
            if self.options.check_finite or not self._agreement.is_made:
                self.check_observers()
        except (ValueError, TypeError) as error:
            return error
        return None
