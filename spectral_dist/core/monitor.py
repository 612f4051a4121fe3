"""Numbers about every matrix, every k steps: computed where it is, reduced once, written out.

optimizer.monitor = Monitor(every=100, write=[to_jsonl("metrics.jsonl")])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.polar import reductions
from spectral_dist.rules import registry
from spectral_dist.rules.base import Rule
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Located

Report: TypeAlias = dict[str, dict[str, float]]
"""Quantity -> matrix -> value."""
QUANTITIES = {
    "update_rms": "root mean square of what is subtracted from the weight, over lr",
    "relative_update": "|lr s D| / |W|, Frobenius norms, without decay",
    "orthogonality_error": "||U U^T - I||_F / sqrt(s) of the polar factor, s its short side",
    "stable_rank": "||X||_F^2 / ||X||_2^2 of what was orthogonalized (power iteration, about 1%)",
    "nuclear_norm": "<X, U>",
}
for entry in registry.builtin_entries():  # 0 for other rules
    QUANTITIES |= entry.rule.quantities if entry.rule else {}
_COLUMNS = ("update_squares", "weight_squares", *list(QUANTITIES)[2:])
POWER_STEPS = 20


class Watch:
    """What a monitor records of one step of one unit: partial sums, a row for each matrix.

    Args:
        located: the unit's matrices.
        rule, options: of the parameter group.
        lr: of the parameter group.

    Attributes:
        table: (matrices, columns), float32; ``add_up`` adds up the tables of all ranks.
    """

    def __init__(
        self, located: Located, rule: Rule[Any], options: MatrixOptions, lr: float
    ) -> None:
        self.located, self.rule, self.options, self.lr = located, rule, options, lr
        self.columns = (*_COLUMNS, *(name for name in rule.quantities if name not in QUANTITIES))
        shape = (len(located.layouts), len(self.columns))
        self.table = torch.zeros(shape, dtype=torch.float32, device=located.device)

    def record_scalar(self, which: Sequence[int], name: str, values: Tensor) -> None:
        """Record a quantity of matrices that this rank owns.

        Args:
            which: indices of the matrices.
            name: of the quantity.
            values: (k,).

        Raises:
            ValueError: the rule has no such quantity.
        """
        if name not in self.columns:
            raise ValueError(
                f"{type(self.rule).__name__} notes {name!r}, which is not in its quantities"
            )
        rows = torch.tensor(which, device=self.table.device)
        self.table[rows, self.columns.index(name)] = values.to(self.table)

    def record_polar(self, which: Sequence[int], matrices: Tensor, factors: Tensor) -> None:
        """Record what polar factors are judged by, of matrices that this rank owns.

        Args:
            which: indices of the matrices.
            matrices: (k, m, n), what was orthogonalized.
            factors: (k, m, n), their polar factors.
        """
        x, u = matrices.float(), factors.float()
        if x.shape[-2] > x.shape[-1]:
            x, u = x.mT, u.mT
        self.record_grams(which, x @ x.mT, u @ u.mT, reductions.inner(x, u))

    def record_grams(
        self, which: Sequence[int], of_matrices: Tensor, of_factors: Tensor, nuclear: Tensor
    ) -> None:
        """Record what polar factors are judged by, given Gram matrices of the short side.

        Args:
            which: indices of the matrices.
            of_matrices: (k, s, s), of what was orthogonalized.
            of_factors: (k, s, s), of the polar factors.
            nuclear: (k,), the inner products <X, U>.
        """
        side = of_factors.shape[-1]
        eye = torch.eye(side, dtype=torch.float32, device=of_factors.device)
        error = torch.linalg.matrix_norm(of_factors - eye) / side**0.5
        self.record_scalar(which, "orthogonality_error", error)
        self.record_scalar(which, "nuclear_norm", nuclear)
        self.record_scalar(which, "stable_rank", _stable_rank(of_matrices))

    def record_update(
        self, which: Sequence[int], weights: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> None:
        """Record the norms of this rank's runs of weights and directions.

        Args:
            which: for each run, the index of its matrix; no run is recorded on two ranks.
            weights: the runs, before they are updated.
            directions: the same runs of the directions.
        """
        if not which:
            return
        rows = torch.tensor(which, device=self.table.device)
        for column, tensors in (("update_squares", directions), ("weight_squares", weights)):
            norms = torch.stack(torch._foreach_norm([t.float() for t in tensors]))
            values = norms.square().to(self.table)
            self.table[:, self.columns.index(column)].index_add_(0, rows, values)

    def report(self) -> Report:
        """Return {quantity: {matrix: value}}, once the tables of all ranks have been added up."""
        result: Report = {name: {} for name in (*QUANTITIES, *self.rule.quantities)}
        for layout, row in zip(self.located.layouts, self.table.tolist(), strict=True):
            columns = dict(zip(self.columns, row, strict=True))
            matrix, update = layout.matrix, columns.pop("update_squares") ** 0.5
            update *= self.rule.scale(self.options, matrix.read_shape)
            weight = columns.pop("weight_squares") ** 0.5
            result["update_rms"][matrix.name] = update / matrix.numel**0.5
            result["relative_update"][matrix.name] = self.lr * update / max(weight, 1e-30)
            for name, value in columns.items():
                result[name][matrix.name] = value
        return result


def stable_rank(x: Tensor) -> Tensor:
    """Return ||X||_F^2 / ||X||_2^2 of each matrix, from POWER_STEPS of the power iteration.

    It is never below the true value, which it approaches from above; 0 for a zero matrix.

    Args:
        x: (k, s, l), s <= l.

    Returns:
        (k,)
    """
    return _stable_rank(x @ x.mT)


def _stable_rank(gram: Tensor) -> Tensor:
    """Return ``stable_rank`` of X, given X X^T, (k, s, s)."""
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    gram = gram / squares.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    v = gram.sum(-1, keepdim=True)
    for _ in range(POWER_STEPS):
        v = gram @ v
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-30)
    largest = (v.mT @ (gram @ v))[:, 0, 0]
    return torch.where(largest > 0, 1 / largest.clamp_min(1e-30), 0.0)


class Monitor:
    """A schedule of reports on all matrices, for ``optimizer.monitor``.

    It is set on every rank, or on rank 0 only; the ranks agree on it once. Between its steps it
    costs nothing.

    Args:
        every: steps from one report to the next; the first is that of step ``every``.
        write: called with (step, report) on the job's first rank: ``to_jsonl``, ``to_tensorboard``
            or your own.
    """

    @explained
    def __init__(self, every: int, write: Sequence[Callable[[int, Report], None]]) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; it must be a whole number of steps, at least 1")
        self.every, self.sinks = every, list(write)

    def write(self, step: int, report: Report) -> None:
        """Hand a report to every sink, on the job's first rank."""
        if collectives.is_first():
            for sink in self.sinks:
                sink(step, report)


def add_up(watches: Sequence[Watch], meter: Meter) -> Report:
    """Return the report of one step over all ranks; a collective call, one reduction a watch.

    Args:
        watches: of the step's units, in the same order on all ranks.
        meter: counts the bytes.
    """
    report: Report = {name: {} for name in QUANTITIES}
    for watch in watches:
        groups: tuple[Group, Group] = (watch.located.group, watch.located.replicas)
        for group in groups:
            collectives.sum_ranks(watch.table, group, meter)
        for name, values in watch.report().items():
            report.setdefault(name, {}).update(values)
    return report


def to_jsonl(path: str | Path) -> Callable[[int, Report], None]:
    """Return a sink for ``Monitor`` that appends a line of JSON to a file for each report.

    A line is {"kind": "matrices", "step": ..., quantity: {matrix: value}}.
    """

    def write(step: int, report: Report) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": "matrices", "step": step, **report}) + "\n")

    return write


def to_tensorboard(writer: Any) -> Callable[[int, Report], None]:
    """Return a sink for ``Monitor`` that writes scalars QUANTITY/MATRIX to TensorBoard.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
    """

    def write(step: int, report: Report) -> None:
        for name, values in report.items():
            for matrix, value in values.items():
                writer.add_scalar(f"{name}/{matrix}", value, step)

    return write
