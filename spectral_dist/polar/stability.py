"""Exact analysis of which odd polynomials keep every singular value bounded and positive.

p(x) = a x + b x^3 + c x^5 maps [0, h] onto [0, max p] if it is nowhere negative, because p(0) = 0.
So the largest value that a schedule reaches follows from critical points alone, step by step, and
every value below it is reached, too. Everything is float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spectral_dist.polar.schedules import Row

ROUNDING = 1e-6
"""Relative growth allowed for before every step of a schedule: eight float32 roundings.

``cans`` is sound in float32 and diverges from 6e-6 on; the other named schedules stay stable at
1e-3.
"""

HALF_ROUNDING = 2.0**-8
"""The growth allowed for if one triple serves every step: that of bfloat16, GPUs' default."""

LIMIT = 10.0
"""A singular value above it counts as diverging; optimal polynomials stay below 2."""

_REPEATS = 1000
"""Steps beyond the last row after which an interval that still grows counts as diverging."""


def check_rows(rows: Sequence[Row], safety: float = 1.0, *, margin: float = ROUNDING) -> None:
    """Check that a schedule lets no singular value diverge or turn negative.

    Rows that are all equal are checked as ``check_fixed`` does.

    Args:
        rows: (a, b, c) of every step; past the end the last one repeats, which must be sound as
            well.
        safety: singular values start in [0, 1 / safety].
        margin: singular values grow by this (relative) before every step.

    Raises:
        ValueError: one does; the text names the step and the singular value. Also for no rows, rows
            that are not three finite numbers, and safety < 1.
    """
    table = _float_rows(rows)
    if not _is_number(safety) or not 1.0 <= safety < math.inf:
        raise ValueError(f"safety is {safety!r}; write a number of at least 1, as in 1.01")
    if all(row == table[0] for row in table):
        margin = max(margin, HALF_ROUNDING)
        if table[0][0] <= 1.0:
            raise ValueError(
                f"{_row_text(table[0])} at every step makes small singular values smaller, not"
                " larger; its first coefficient must be above 1"
            )
    _Analysis(table, 1.0 / safety, margin).run()


def check_fixed(row: Row, *, margin: float = HALF_ROUNDING) -> None:
    """Check that (a, b, c) at every step lets no singular value diverge or turn negative.

    The maximum of p below its unstable fixed point must be lower than that point, and so must 1, by
    ``margin`` (relative, at least that of bfloat16); small singular values must grow (a > 1).
    Source: the condition that ROOT's coefficients (arXiv 2511.20626) need and do not all meet.

    Raises:
        ValueError: one does; the text names the step and the singular value.
    """
    check_rows((row,), margin=max(margin, HALF_ROUNDING))


def evaluate(row: Row, x: float) -> float:
    """Return p(x)."""
    a, b, c = row
    y = x * x
    return x * (a + y * (b + y * c))


def critical_points(row: Row) -> list[float]:
    """Return the x > 0 where p'(x) = 0, ascending."""
    a, b, c = row
    return _positive_roots(5 * c, 3 * b, a)


def fixed_points(row: Row) -> list[float]:
    """Return the x > 0 where p(x) = x, ascending."""
    a, b, c = row
    return _positive_roots(c, b, a - 1.0)


class _Analysis:
    """The interval [0, high] of singular values, followed through the steps.

    Attributes:
        exact: (a, b, c) of every step.
        table: the same with the growth by rounding before each step.
        highs: ``highs[k]`` is the end of the interval that enters step k.
        margin: the growth, relative.
    """

    def __init__(self, table: list[Row], high: float, margin: float) -> None:
        self.exact = table
        self.table = [_with_rounding(row, margin) for row in table]
        self.highs = [high]
        self.margin = margin

    def run(self) -> None:
        """Raise a ValueError at the first step that is unsound."""
        count = len(self.table)
        for step in range(count):
            self.advance(step)
        last = self.table[-1]
        for step in range(count, count + _REPEATS):
            high = self.highs[step]
            if evaluate(last, high) > high and not any(x >= high for x in fixed_points(last)):
                self.fail_escape(step)
            self.advance(step)
            if self.highs[-1] <= high * (1.0 + 1e-14):
                return  # [0, high] is mapped into itself
        self.fail_escape(count + _REPEATS)

    def row(self, step: int) -> Row:
        """Return the row of a step, counted from 0; past the end the last one."""
        return self.table[min(step, len(self.table) - 1)]

    def points(self, step: int) -> list[float]:
        """Return the x at which p may be extreme on the interval that enters the step."""
        end = self.highs[step]
        return [*(x for x in critical_points(self.row(step)) if x < end), end]

    def advance(self, step: int) -> None:
        """Map the interval by one step; fail on negative or huge values."""
        row, points = self.row(step), self.points(step)
        values = [evaluate(row, x) for x in points]
        lowest, highest = min(values), max(values)
        if row[0] <= 0.0 or lowest < 0.0:
            self.fail(step, points[values.index(lowest)], "and turns its direction round")
        if not highest <= LIMIT:
            self.fail(step, points[values.index(highest)], "and diverges")
        self.highs.append(highest)

    def fail_escape(self, step: int) -> None:
        """Raise a ValueError: the highest value after ``step`` steps grows with each later one."""
        value, last = self.highs[step], self.exact[-1]
        below = [x for x in fixed_points(last) if x * (1.0 - 2.0 * self.margin) <= value]
        where = f" beyond {below[-1]:.4f}, the unstable fixed point," if below else " there"
        what = f"(rounding: {self.margin:.1g});{where} repeating this row diverges"
        step = max(step - 1, 0)
        row = self.row(step)
        self.fail(step, max(self.points(step), key=lambda x: evaluate(row, x)), what)

    def fail(self, step: int, x: float, what: str) -> None:
        """Raise a ValueError that traces the value x at a step back to where it began."""
        value = evaluate(self.row(step), x)
        sigma = x
        for k in reversed(range(step)):
            sigma = _preimage(self.row(k), sigma, self.highs[k])
        count = len(self.table)
        repeated = f" (row {count} again)" * (step >= count > 1)
        start = f" ({sigma:.4g} before step 1)" * (step > 0)
        before = f"a singular value of {x * (1.0 + self.margin):.4f}{start}"
        row = _row_text(self.exact[min(step, count - 1)])
        raise ValueError(
            f"unstable: step {step + 1}{repeated}, {row}, takes"
            f" {before} to {value:.4f} {what}. Write coefficients that stay lower (or a larger"
            " safety for a schedule), or compute them: `spectral-dist calibrate` for one row,"
            " spectral_dist.polar.generate.optimal for a schedule"
        )


def _with_rounding(row: Row, margin: float) -> Row:
    """Return the row of p(x (1 + margin)): the worst that rounding upwards does before a step."""
    a, b, c = row
    growth = 1.0 + margin
    return a * growth, b * growth**3, c * growth**5


def _positive_roots(c: float, b: float, a: float) -> list[float]:
    """Return the square roots of the positive y with c y^2 + b y + a = 0, ascending."""
    if c == 0.0:
        squares = [-a / b] if b else []
    else:
        discriminant = b * b - 4 * c * a
        if discriminant < 0.0:
            return []
        # the form without cancellation, whatever the sign of b
        q = -0.5 * (b + math.copysign(math.sqrt(discriminant), b))
        squares = [q / c, a / q] if q else [0.0]
    return sorted(math.sqrt(y) for y in squares if 0.0 < y < math.inf)


def _preimage(row: Row, value: float, end: float) -> float:
    """Return the smallest x in [0, end] with p(x) = value; p rises to it somewhere."""
    low = 0.0
    for high in [*(x for x in critical_points(row) if x < end), end]:
        if evaluate(row, high) >= value:
            break
        low = high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if evaluate(row, middle) < value else (low, middle)
    return high


def _float_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows as tuples of three floats.

    Raises:
        ValueError: they are no list of three finite numbers each.
    """
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ValueError(f"rows is {rows!r}; write a list of (a, b, c), one for each step")
    if not rows:
        raise ValueError("rows is empty; write at least one (a, b, c)")
    table: list[Row] = []
    for step, row in enumerate(rows):
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 3:
            raise ValueError(f"row {step + 1} is {row!r}; write three numbers (a, b, c)")
        if not all(_is_number(value) and abs(value) <= 1e9 for value in row):
            raise ValueError(f"row {step + 1} is {row!r}; its numbers must be finite (below 1e9)")
        table.append((float(row[0]), float(row[1]), float(row[2])))
    return table


def _is_number(value: object) -> bool:
    """Return whether a value is a number and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _row_text(row: Row) -> str:
    """Return a row as text, four digits each."""
    return "({:.4f}, {:.4f}, {:.4f})".format(*row)
