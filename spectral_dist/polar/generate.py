"""Newton-Schulz schedules that are optimal for a lower bound of the singular values.

Every step is the odd polynomial closest to 1 (in the maximum norm) on the interval that the steps
before it reach. Polar Express, arXiv 2505.16932, algorithm 1 and its finite-precision section.
Everything is float64 on the host.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from spectral_dist._error_help import explained
from spectral_dist.polar.schedules import Row, check_steps
from spectral_dist.polar.stability import critical_points, evaluate

CUSHION = 0.02407327424182761
"""Fraction of an interval's upper end below which its lower end is never taken.

Below it p comes so close to 0 inside the interval that rounding turns singular values negative.
"""

_CONVERGED = 5e-6
"""Relative width below which an interval gets the polynomial of the limit of zero width: the linear
system is singular in that limit, and p is 1 to within the cube of the width."""


@explained
def optimal(
    lower: float,
    steps: int,
    *,
    degree: Literal[3, 5] = 5,
    cushion: float = CUSHION,
    safety: float = 1.0,
) -> tuple[Row, ...]:
    """Return the (a, b, c) of each of ``steps`` steps, optimal for singular values in [lower, 1].

    At safety 1 every row spans exactly the range of the row before, and a first step with nothing
    to spare lets rounding diverge: such a schedule may fail ``stability.check_rows``. Schedules of
    safety > 1 and at least two steps pass. A single row is only good for a single step.

    Args:
        lower: the smallest normalised singular value to bring near 1.
        steps: number of steps.
        degree: 5, or 3 (c = 0: one product less).
        cushion: no interval's lower end is taken below this part of its upper end.
        safety: X must start from ||X||_F * safety. All rows but the last are those of
            p(x / safety), so that singular values up to ``safety`` do not diverge.

    Raises:
        ValueError: lower not in (0, 1], steps < 1, another degree, cushion not in [0, 1) or
            safety < 1.
    """
    _check(lower, steps, degree, cushion, safety)
    best = best_quintic if degree == 5 else best_cubic
    table: list[Row] = []
    low, high = float(lower), 1.0
    for _ in range(steps):
        a, b, c = best(max(low, cushion * high), high)
        row = (a, b, c)
        points = [x for x in (*critical_points(row), low, high) if low <= x <= high]
        top = max(evaluate(row, x) for x in points)
        # with a cushion p is further from 1 at the true lower end than anywhere else
        centre = 2.0 / (evaluate(row, low) + top)
        row = (a * centre, b * centre, c * centre)
        table.append(row)
        low = min(evaluate(row, low), 1.0)  # rounding may put it above
        high = 2.0 - low
    widened = [(a / safety, b / safety**3, c / safety**5) for a, b, c in table[:-1]]
    return (*widened, table[-1])


def best_quintic(low: float, high: float) -> Row:
    """Return the odd quintic closest to 1 on [low, high], 0 < low <= high, by a Remez exchange.

    The four points where |p - 1| is largest are both ends and the two critical points between.
    """
    if low / high > 1.0 - _CONVERGED:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    error = math.inf
    row: Row = (0.0, 0.0, 0.0)
    for _ in range(100):
        x = torch.tensor([low, *inner, high], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, signs], dim=1)
        a, b, c, e = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        row, before, error = (a, b, c), error, e
        if abs(before - error) < 1e-15:
            break
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return row


def best_cubic(low: float, high: float) -> Row:
    """Return the odd cubic closest to 1 on [low, high], 0 < low <= high, in closed form; c = 0."""
    alpha = math.sqrt(3.0 / (high * high + low * high + low * low))
    beta = 4.0 / (2.0 + low * high * (low + high) * alpha**3)
    return 1.5 * alpha * beta, -0.5 * alpha**3 * beta, 0.0


def _check(lower: float, steps: int, degree: int, cushion: float, safety: float) -> None:
    """Raise the ValueError of ``optimal``."""

    def number(value: object) -> bool:
        """Return whether a value is a number and no bool."""
        return isinstance(value, int | float) and not isinstance(value, bool)

    if not number(lower) or not 0.0 < lower <= 1.0:
        raise ValueError(
            f"lower is {lower!r}; write the smallest normalised singular value to bring near 1,"
            " above 0 and at most 1, as in 1e-3"
        )
    check_steps(steps)
    if degree not in (3, 5):
        raise ValueError(f"degree is {degree!r}; write 5 or 3")
    if not number(cushion) or not 0.0 <= cushion < 1.0:
        raise ValueError(f"cushion is {cushion!r}; write a number in [0, 1), as in {CUSHION:.3f}")
    if not number(safety) or not 1.0 <= safety < math.inf:
        raise ValueError(f"safety is {safety!r}; write a number of at least 1, as in 1.01")
