"""POET's optimizer: Adam on the skew parameters, AdamW on the rest, and the merge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.core.agreement import Grads
from spectral_dist.core.precision import without_autocast
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.core.units import Unit
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, Placement
from spectral_dist.poet import report
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.poet.options import POETOptions
from spectral_dist.poet.report import MergeReport
from spectral_dist.rules.adamw import AdamWOptions

START = 0.1
"""The fraction of the clipping limit that holds in the first step after a merge."""


def clip_ramp_factor(since: int, ramp: int, merged: bool) -> float:
    """Return the factor of the limit of gradient clipping in the coming step.

    Args:
        since: steps taken since the last merge.
        ramp: steps over which the limit grows from ``START`` to all of it; 0 turns the ramp off.
        merged: whether the optimizer has merged at all. Its first steps have no ramp.
    """
    if since >= ramp or not merged:
        return 1.0
    return START + (1 - START) * since / ramp


class POET(ShardedOptimizer):
    """The optimizer of the rotations of a model that ``spectral_dist.poet.convert`` has converted.

    Every parameter is stepped elementwise where it lies, with moments in float32. Every
    ``merge_every`` steps (arXiv 2506.08001, algorithm 1) the rotations are multiplied into the
    frozen weights, and the skew parameters, their moments and their step count start again from
    zero, in the same step.

    Options: ``spectral_dist.poet.options.POETOptions``. The count of steps since the last merge is
    ``step`` in the state of the skew parameters, and that of merges is in the layers: both are in
    every checkpoint.
    """

    options_type = POETOptions
    rule_name = "POET"
    copied = (*ShardedOptimizer.copied, "_ramp_asked")
    options: POETOptions

    @explained
    def __init__(self, params: Iterable[Any], lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.require_layers()
        self._ramp_asked = False

    def begin(self, placement: Placement | None) -> None:
        """Set all attributes that are not copied, as before the first step."""
        super().begin(placement)
        self._report: MergeReport | None = None

    def require_layers(self) -> None:
        """Raise a ValueError if the model has no layer to rotate."""
        if not self.layers:
            raise ValueError(
                "POET trains the rotations of a model that spectral_dist.poet.convert(model) has"
                " converted; this one has none"
            )

    @property
    def layers(self) -> list[PoetLayer]:
        """Return the rotated layers, in the model's order."""
        by_id = {id(r.layer): r.layer for r in self.all_routes if r.layer is not None}
        return list(by_id.values())

    def steps_taken(self) -> int:
        """Return the steps taken, those before the last merge included.

        The count is right if ``merge_every`` has never changed.
        """
        return self.layers[0].merges * self._merge_every() + self.steps_since_merge()

    def steps_since_merge(self) -> int:
        """Return the steps that the skew parameters have taken since the last merge."""
        return int(max(self._step_counts("skew"), default=0.0))

    def has_merged(self) -> bool:
        """Return whether this optimizer has merged, now or before its checkpoint was written.

        The model's count of merges alone does not say so. It may be that of a run whose optimizer
        was not loaded, and then a new run starts here: no merge has just emptied Adam's moments.
        Parameters that AdamW trains count every step; only without any is the model's count taken.
        """
        totals = self._step_counts("scalar")
        merged = self.layers[0].merges > 0
        return merged and (not totals or max(totals) > self.steps_since_merge())

    def finalize_group(self, carried: ParamGroup, routes: Sequence[ParamSpec]) -> ParamGroup:
        """Return the fields of a group unchanged.

        Raises:
            ValueError: the group is of rotations and asks for weight decay.
        """
        if carried["kind"] == "skew" and carried["weight_decay"]:
            raise ValueError(
                "a parameter group: weight_decay is set for rotations, which have none; set it in"
                " the groups of kind 'scalar', or write POET(..., weight_decay=)"
            )
        return carried

    def step_matrices(
        self, group: ParamGroup, unit: Unit, tensors: Sequence[Tensor], grads: Grads
    ) -> None:
        """Raise an AssertionError: there are no matrices, so nothing calls it."""
        raise AssertionError("POET has no groups of matrices")

    def scalar_options(self, group: ParamGroup) -> AdamWOptions:
        """Return Adam's options, without decay of rotations whatever a scheduler has written."""
        options = super().scalar_options(group)
        return replace(options, weight_decay=0.0) if group["kind"] == "skew" else options

    def clip_factor(self) -> float:
        """Return the factor of the limit of gradient clipping in the coming step.

        The factor is 1, but grows from 0.1 to 1 over the ``clip_ramp`` steps after a merge.
        Frameworks that clip by themselves are told; in a loop of your own write
        ``clip_grad_norm_(parameters, limit * optimizer.clip_factor())``.
        """
        self._ramp_asked = True
        ramp = self.options.clip_ramp
        if not ramp:
            return 1.0
        return clip_ramp_factor(self.steps_since_merge(), ramp, self.has_merged())

    @explained
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and merge if it is due (unless a framework has yet to write the model).

        Args:
            closure: as in ``torch.optim.Optimizer.step``.

        Returns:
            The closure's result.
        """
        self._write_report(waits=False)
        if self.options.clip_ramp and not self._ramp_asked and self.has_merged():
            self._ramp_asked = True
            warnings.warn(
                f"clip_ramp is {self.options.clip_ramp}, but nobody asks for clip_factor(): clip"
                " gradients to limit * optimizer.clip_factor(), or leave clip_ramp out",
                stacklevel=2,
            )
        loss = super().step(closure)
        if not self.placement.has_master_weights:
            self.merge_if_due()
        return loss

    @explained
    @torch.no_grad()
    def merge_if_due(self) -> bool:
        """Merge if it is due, and return whether it was. A collective call.

        The model must have the values of the last step.
        """
        if self.steps_since_merge() < self._merge_every():
            return False
        self.check_last_step()  # a merge changes the model whatever the flag on the device says
        with without_autocast(self.device):
            self._merge()
        return True

    def _merge(self) -> None:
        """Merge all layers, start the skew parameters' state again, and report on the rotations."""
        if "copies" not in self._warned and any(layer.averages() for layer in self.layers):
            self._warned.add("copies")
            warnings.warn(
                "POET merges now, and something averages the parameters of this model (torch's"
                " AveragedModel, an EMA): from here on that average is refused. Average what"
                " spectral_dist.poet.export(model) returns, loaded into a plain model",
                stacklevel=4,
            )
        is_watched = self.is_monitored or self.monitor is not None
        numbers, drifts = [], []
        for layer in self.layers:
            skews = layer.skews
            with self.placement.gathered([layer.weight, *skews.values()], write=True) as gathered:
                weight, named_skews = gathered[0], dict(zip(skews, gathered[1:], strict=True))
                numbers.append(report.rotations(layer, named_skews))
                before = layer.full_weight(weight).clone() if is_watched else None
                layer.merge(weight, named_skews)
                if before is not None:
                    drifts.append(report.drift(before, layer.full_weight(weight)))
        for group, tensors in self.placement.param_batches(self):
            if group["kind"] == "skew":
                self._restart(tensors)
        table = report.max_over_ranks(self.layers, numbers, self.meter)
        self._write_report(waits=True)  # of the merge before
        self._report = MergeReport(self.layers, table, drifts, self.steps_taken())
        self._write_report(waits=is_watched)

    def _write_report(self, waits: bool) -> None:
        """Write the report of the last merge, if it has not been written.

        Args:
            waits: for the numbers; else a later call writes them unless they have arrived.
        """
        report_of_merge = self._report
        if report_of_merge is not None and (waits or report_of_merge.is_here()):
            self._report = None
            report_of_merge.write(self.monitor)

    def _restart(self, tensors: Iterable[Tensor]) -> None:
        """Zero the tensors that the optimizer steps on, master copies too, and their Adam state."""
        for p in tensors:
            self.placement.local(p).zero_()
            for value in self.state.get(p, {}).values():
                if isinstance(value, Tensor):
                    self.placement.local(value).zero_()

    def _merge_every(self) -> int:
        """Return the steps from one merge to the next, as the parameter groups have it."""
        periods = [int(g["merge_every"]) for g in self.param_groups if g["kind"] == "skew"]
        # ZeRO steps group by group, so that there may be no group of rotations at the moment
        return periods[0] if periods else self.options.merge_every

    def _step_counts(self, kind: str) -> list[float]:
        """Return the steps of each of a kind's parameters, 0 for one that has no state yet."""
        return [
            float(self.state.get(p, {}).get("step", 0.0))
            for group, tensors in self.placement.param_batches(self)
            for p in tensors
            if group["kind"] == kind
        ]
