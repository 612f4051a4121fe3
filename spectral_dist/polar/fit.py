"""AdaNewton: fits the (a, b, c) of every Newton-Schulz step to the singular values of a shape.

ROOT, arXiv 2511.20626. A scalar problem: minimise the squared distance between 1 and the result of
the steps on given singular values, among the polynomials that are stable
(``stability.check_fixed``). Everything is float64 on the host and deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.polar.schedules import SCHEDULES, Row, check_steps
from spectral_dist.polar.stability import check_fixed

PUBLISHED: dict[tuple[int, int], Row] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
"""ROOT's own rows by (shorter, longer) side, as printed. That of 2048 x 2048 is unstable."""

FALLBACK: Row = SCHEDULES["jordan"].rows[0]
"""The row for shapes that nobody has calibrated: jordan's."""

MARGIN = 0.01
"""The relative distance that a fitted p keeps between its maximum and its unstable fixed point.

Measured: one step in bfloat16 puts singular values up to .5% above the maximum of p.
"""

_DIGITS = 5  # of the rows: .1% of MARGIN, and they print as published ones do
_GRID = (24, 14, 10)  # points along each axis of the box
_MOST_MINIMA = 10  # local minima of the grid from which the polish begins


def evaluate(sigmas: Tensor, row: Row, steps: int) -> Tensor:
    """Return normalised singular values after ``steps`` steps of x <- a x + b x^3 + c x^5.

    Args:
        sigmas: any shape.
        row: (a, b, c) of every step.
        steps: number of steps.

    Returns:
        A tensor of the shape and dtype of ``sigmas``.
    """
    a, b, c = row
    x = sigmas
    for _ in range(steps):
        y = x * x
        x = x * (a + y * (b + y * c))
    return x


@explained
def relative_error(sigmas: Tensor, row: Row, steps: int, weights: Tensor | None = None) -> float:
    """Return ||p(S) - 1|| / sqrt(count), the polar factor's relative error in the Frobenius norm.

    Args:
        sigmas: singular values over the matrix's Frobenius norm, any shape; computed in float64.
        row: (a, b, c) of every step.
        steps: number of steps.
        weights: of each singular value (the counts of a histogram, say), not negative; None: equal.

    Raises:
        ValueError: no values, or values or weights out of range.
    """
    sigmas, weights = _normalized(sigmas, weights)
    square = torch.dot(weights, (evaluate(sigmas, row, steps) - 1.0).square())
    return math.sqrt(square.item())


@explained
def random_spectrum(shape: Sequence[int], count: int = 512) -> Tensor:
    """Return quantiles of the singular values of a Gaussian matrix over its Frobenius norm.

    The values are those of the limit of large matrices (Marchenko-Pastur's law); good from a
    shorter side of about 16 on. A vector has the one singular value 1.

    Args:
        shape: (m, n) of the matrix.
        count: number of quantiles.

    Returns:
        (count,) float64, ascending.

    Raises:
        ValueError: the shape is not two whole numbers of at least 1, or count < 1.
    """
    if len(shape) != 2 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"shape is {tuple(shape)}; write two whole numbers, as in (512, 2048)")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}; it must be a whole number, at least 1")
    short, long = min(shape), max(shape)
    if short == 1:
        return torch.ones(count, dtype=torch.float64)
    ratio = short / long
    # eigenvalues 1 + ratio + 2 sqrt(ratio) cos(t): in t the density is smooth at both edges
    cells = 1 << 14
    t = math.pi * (1.0 - (torch.arange(cells, dtype=torch.float64) + 0.5) / cells)
    values = 1.0 + ratio + 2.0 * math.sqrt(ratio) * t.cos()
    density = t.sin().square() / values
    cumulative = density.cumsum(0)
    centers = cumulative - 0.5 * density
    targets = (torch.arange(count, dtype=torch.float64) + 0.5) / count * cumulative[-1]
    right = torch.searchsorted(centers, targets).clamp(1, cells - 1)
    fraction = (targets - centers[right - 1]) / (centers[right] - centers[right - 1])
    quantiles = values[right - 1] + fraction * (values[right] - values[right - 1])
    quantiles = quantiles.clamp_min((1.0 - math.sqrt(ratio)) ** 2)
    # quantiles lose some of the mean, which normalising by the norm fixes
    return (quantiles / (quantiles.mean() * short)).sqrt()


@explained
def fit(
    sigmas: Tensor, weights: Tensor | None = None, *, steps: int = 5, start: Row | None = None
) -> Row:
    """Return the stable (a, b, c) that makes the weighted sum of (p_steps(sigma) - 1)^2 smallest.

    The result is jordan's row, ``start``, or a row that passes ``check_fixed`` with ``MARGIN`` to
    spare. On this data it is at least as good as jordan's and as ``start``.

    Args:
        sigmas: singular values over the Frobenius norm of their matrix, in [0, 1], any shape.
        weights: of each singular value, not negative; None: equal.
        steps: number of steps that the row is used for.
        start: a stable row to begin from as well.

    Raises:
        ValueError: no values, values or weights out of range, steps < 1, or ``start`` unstable.
    """
    sigmas, weights = _normalized(sigmas, weights)
    check_steps(steps)
    if start is not None:
        check_fixed(start)
    baselines = [FALLBACK, *([start] if start else [])]
    problem = _Problem(sigmas, weights, steps)
    starts = [_from_row(row) for row in (*baselines, *PUBLISHED.values()) if row[2] > 0.0]
    starts = [*starts, *_grid_minima(sigmas, weights, steps)]
    polished = sorted((problem.polish(u) for u in starts), key=lambda pair: pair[0])
    best, best_error = baselines[0], relative_error(sigmas, baselines[0], steps, weights)
    for row in (*baselines[1:], *(_to_row(u) for _, u in polished)):
        candidate: Row = (round(row[0], _DIGITS), round(row[1], _DIGITS), round(row[2], _DIGITS))
        candidate = row if row in baselines else candidate
        error = relative_error(sigmas, candidate, steps, weights)
        if error < best_error and _is_stable(candidate, 0.0 if candidate in baselines else MARGIN):
            best, best_error = candidate, error
    return best


class _Problem:
    """Least squares in the three numbers of ``_to_row``, each within [0, 1]."""

    def __init__(self, sigmas: Tensor, weights: Tensor, steps: int) -> None:
        self.sigmas, self.root_weights, self.steps = sigmas, weights.sqrt(), steps

    def residuals(self, u: Tensor) -> Tensor:
        """Return the weighted distances from 1, (count,), of the row at point ``u`` of the box."""
        return self.root_weights * (evaluate(self.sigmas, _to_row(u), self.steps) - 1.0)

    def polish(self, u: Tensor) -> tuple[float, Tensor]:
        """Reduce the sum of squares by Levenberg-Marquardt steps from ``u``, clipped to the box.

        Returns:
            The sum of squares, and the point of the box where it is reached.
        """
        r = self.residuals(u)
        loss, damping = r.square().sum().item(), 1e-3
        for _ in range(60):
            jacobian = self.jacobian(u, r)
            if not jacobian.isfinite().all():
                break
            gradient = jacobian.T @ r
            # a number at its limit that would have to go further stays at the limit
            free = ~(((u >= 1.0) & (gradient < 0)) | ((u <= 0.0) & (gradient > 0)))
            jacobian = jacobian * free
            normal = jacobian.T @ jacobian
            before = loss
            while damping < 1e8:
                scale = normal.diagonal() + 1e-12 * normal.trace() + 1e-30
                step = torch.linalg.solve(normal + damping * scale.diag(), -gradient * free)
                trial = (u + step).clamp(0.0, 1.0)
                trial_r = self.residuals(trial)
                trial_loss = trial_r.square().sum().item()
                if trial_loss < loss:  # NaN is not
                    u, r, loss, damping = trial, trial_r, trial_loss, damping * 0.2
                    break
                damping *= 5.0
            if loss > before * (1.0 - 1e-8):
                break
        return loss, u

    def jacobian(self, u: Tensor, r: Tensor) -> Tensor:
        """Return the residuals' derivatives (count, 3), by differences that stay inside the box."""
        columns = []
        for i in range(3):
            h = -1e-6 if u[i] > 0.5 else 1e-6
            moved = u.clone()
            moved[i] += h
            columns.append((self.residuals(moved) - r) / h)
        return torch.stack(columns, dim=1)


# The box. Three numbers in [0, 1] determine a stable quintic: where p has its maximum (log-spaced),
# the ratio of the squares of its two critical points (1: none left; 5: it touches 0), and how high
# the maximum is: from 1 to the highest M that is stable with MARGIN, p((1 + MARGIN) M) = M.
_PEAK = (0.05, 1.5)
_RATIO = (1.0, 4.9)
_STABLE_FACTOR = 1.0 + 1.02 * MARGIN  # a little more than is checked, for rounding to _DIGITS


def _to_row(u: Tensor) -> Row:
    """Return the (a, b, c) at a point (3,) of the box; NaN where no such row is stable."""
    peak_number, ratio_number, height = u.tolist()
    peak = _PEAK[0] * (_PEAK[1] / _PEAK[0]) ** peak_number
    ratio = _RATIO[0] + (_RATIO[1] - _RATIO[0]) * ratio_number
    limit = peak * _return_point(ratio) / _STABLE_FACTOR
    if limit < 1.0:  # a singular value of 1 would diverge
        return math.nan, math.nan, math.nan
    top = limit**height
    scale = top / (ratio - 0.2) * 0.3 / peak
    return (
        scale * 5.0 * ratio,
        -scale * (5.0 / 3.0) * (1.0 + ratio) / peak**2,
        scale / peak**4,
    )


def _from_row(row: Row) -> Tensor:
    """Return the point (3,) of the box that is nearest to a row."""
    a, b, c = row
    root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
    low, high = (-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)
    if low <= 0.0:
        return torch.full((3,), 0.5, dtype=torch.float64)
    peak, ratio = math.sqrt(low), min(high / low, _RATIO[1])
    top = peak * (a + low * (b + low * c))
    limit = peak * _return_point(ratio) / _STABLE_FACTOR
    height = math.log(max(top, 1.0)) / math.log(limit) if limit > 1.0 else 1.0
    peak_number = math.log(peak / _PEAK[0]) / math.log(_PEAK[1] / _PEAK[0])
    ratio_number = (ratio - _RATIO[0]) / (_RATIO[1] - _RATIO[0])
    return torch.tensor([peak_number, ratio_number, height], dtype=torch.float64).clamp(0.0, 1.0)


def _return_point(ratio: float) -> float:
    """Return the x beyond both critical points where a p with its maximum at 1 is as high again."""
    top = (10.0 * ratio - 2.0) / 3.0
    x = 2.0 + ratio
    for _ in range(50):  # Newton's method from above, where p is convex
        y = x * x
        value = x * (5.0 * ratio + y * (y - (5.0 / 3.0) * (1.0 + ratio))) - top
        step = value / (5.0 * (y - 1.0) * (y - ratio))
        x -= step
        if step < 1e-13:
            break
    return x


def _grid_minima(sigmas: Tensor, weights: Tensor, steps: int) -> list[Tensor]:
    """Return the lowest local minima of a grid over the box, on 128 quantiles of the values."""
    order = sigmas.argsort(stable=True)
    cumulative = weights[order].cumsum(0)
    targets = (torch.arange(128, dtype=torch.float64) + 0.5) / 128 * cumulative[-1]
    quantiles = sigmas[order[torch.searchsorted(cumulative, targets).clamp_max(len(order) - 1)]]
    grid, rows = _grid()
    x = quantiles.expand(len(rows), -1)
    for _ in range(steps):
        y = x * x
        x = x * (rows[:, :1] + y * (rows[:, 1:2] + y * rows[:, 2:]))
    error = (x - 1.0).square().mean(1).nan_to_num(math.inf, math.inf)
    # one start for each local minimum
    lowest = -torch.nn.functional.max_pool3d(-error.view(1, 1, *_GRID), 3, stride=1, padding=1)
    error = torch.where(error == lowest.view(-1), error, math.inf)
    minima = error.argsort(stable=True)[:_MOST_MINIMA]
    return [grid[i] for i in minima[error[minima].isfinite()].tolist()]


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Return the points of the grid over the box (count, 3), and their rows (count, 3)."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in _GRID]
    grid = torch.cartesian_prod(*axes)
    return grid, torch.tensor([_to_row(u) for u in grid], dtype=torch.float64)


def _is_stable(row: Row, margin: float) -> bool:
    """Return whether ``check_fixed`` passes a row with this margin."""
    try:
        check_fixed(row, margin=margin)
    except ValueError:
        return False
    return True


def _normalized(sigmas: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values and weights flat, in float64 and on the CPU; the weights sum to 1.

    Raises:
        ValueError: no values, or values or weights out of range.
    """
    sigmas = sigmas.detach().to("cpu", torch.float64).reshape(-1)
    if not len(sigmas):
        raise ValueError("sigmas is empty; give at least one singular value")
    if not bool(((sigmas >= 0.0) & (sigmas <= 1.0 + 1e-6)).all()):
        raise ValueError(
            "sigmas must be singular values divided by their matrix's Frobenius norm, so in"
            f" [0, 1]; these go from {sigmas.min().item():.4g} to {sigmas.max().item():.4g}"
        )
    if weights is None:
        return sigmas, torch.full_like(sigmas, 1.0 / len(sigmas))
    weights = weights.detach().to("cpu", torch.float64).reshape(-1)
    if weights.shape != sigmas.shape:
        raise ValueError(f"{len(weights)} weights for {len(sigmas)} sigmas; give one for each")
    total = weights.sum().item()
    if not bool((weights >= 0.0).all()) or not 0.0 < total < math.inf:
        raise ValueError("weights must be finite and not negative, and one of them positive")
    return sigmas, weights / total
