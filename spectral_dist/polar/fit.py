"""AdaNewton: the (a, b, c) for every Newton-Schulz step that suits the singular values of a shape.

ROOT, arXiv 2511.20626. A scalar problem: minimise the squared distance from 1 of what the steps
make of given singular values, among the polynomials that are stable (``stability.check_fixed``).
Everything is float64 on the host and deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

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
"""For shapes that nobody has calibrated: jordan's."""

MARGIN = 0.01
"""What a fitted p leaves between its maximum and its unstable fixed point (relative).

Measured: one step in bfloat16 puts singular values up to .5% above the maximum of p.
"""

_DIGITS = 5  # of the rows: .1% of MARGIN, and they print as published ones do
_GRID = (24, 14, 10)
_POLISHED = 10


def evaluate(sigmas: Tensor, row: Row, steps: int) -> Tensor:
    """What ``steps`` steps of x <- a x + b x^3 + c x^5 make of normalised singular values."""
    a, b, c = row
    x = sigmas
    for _ in range(steps):
        y = x * x
        x = x * (a + y * (b + y * c))
    return x


def relative_error(sigmas: Tensor, row: Row, steps: int, weights: Tensor | None = None) -> float:
    """||p(S) - 1|| / sqrt(count): the relative error of the polar factor in the Frobenius norm.

    sigmas: singular values over the matrix's Frobenius norm, any shape; weights: like them (counts
    of a histogram, say), not negative. Inputs go to float64.
    """
    sigmas, weights = _checked(sigmas, weights)
    square = torch.dot(weights, (evaluate(sigmas, row, steps) - 1.0).square())
    return math.sqrt(square.item())


def random_spectrum(shape: Sequence[int], count: int = 512) -> Tensor:
    """Singular values over the Frobenius norm of a Gaussian matrix of ``shape``, as quantiles.

    ``count`` float64 values, ascending, of the limit of large matrices (Marchenko-Pastur's law);
    good from a shorter side of about 16 on. A vector has the one singular value 1.
    ValueError: not two whole numbers of at least 1, count < 1.
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
    reached = (t.sin().square() / values).cumsum(0)
    middle = reached - 0.5 * t.sin().square() / values
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * reached[-1]
    right = torch.searchsorted(middle, wanted).clamp(1, cells - 1)
    share = (wanted - middle[right - 1]) / (middle[right] - middle[right - 1])
    found = values[right - 1] + share * (values[right] - values[right - 1])
    found = found.clamp_min((1.0 - math.sqrt(ratio)) ** 2)
    # quantiles lose some of the mean, which normalising by the norm fixes
    return (found / (found.mean() * short)).sqrt()


def fit(
    sigmas: Tensor, weights: Tensor | None = None, *, steps: int = 5, start: Row | None = None
) -> Row:
    """The stable (a, b, c) that makes the weighted sum of (p_steps(sigma) - 1)^2 smallest.

    sigmas: singular values over the Frobenius norm of their matrix, in [0, 1]; weights: like them,
    None: equal. The result passes ``check_fixed`` with ``MARGIN`` to spare, and is at least as good
    on this data as jordan's and as ``start`` (if that is stable). ValueError: no values, values or
    weights out of range, steps < 1, ``start`` unstable.
    """
    sigmas, weights = _checked(sigmas, weights)
    check_steps(steps)
    if start is not None:
        check_fixed(start)
    known = [FALLBACK, *([start] if start else [])]
    problem = _Problem(sigmas, weights, steps)
    begin = [_from_row(row) for row in (*known, *PUBLISHED.values()) if row[2] > 0.0]
    begin = [*begin, *_coarse(sigmas, weights, steps)]
    polished = sorted((problem.polish(u) for u in begin), key=lambda pair: pair[0])
    best, error = known[0], relative_error(sigmas, known[0], steps, weights)
    for row in (*known[1:], *(_to_row(u) for _, u in polished)):
        candidate: Row = (round(row[0], _DIGITS), round(row[1], _DIGITS), round(row[2], _DIGITS))
        candidate = row if row in known else candidate
        reached = relative_error(sigmas, candidate, steps, weights)
        if reached < error and _is_sound(candidate, 0.0 if candidate in known else MARGIN):
            best, error = candidate, reached
    return best


class _Problem:
    """Least squares in the three numbers of ``_to_row``, each within [0, 1]."""

    def __init__(self, sigmas: Tensor, weights: Tensor, steps: int) -> None:
        self.sigmas, self.roots, self.steps = sigmas, weights.sqrt(), steps

    def residuals(self, u: Tensor) -> Tensor:
        return self.roots * (evaluate(self.sigmas, _to_row(u), self.steps) - 1.0)

    def polish(self, u: Tensor) -> tuple[float, Tensor]:
        """(sum of squares, u) after Levenberg-Marquardt steps clipped to the box."""
        r = self.residuals(u)
        loss, damping = r.square().sum().item(), 1e-3
        for _ in range(60):
            jacobian = self.jacobian(u, r)
            if not jacobian.isfinite().all():
                break
            gradient = jacobian.T @ r
            # a number at its limit that wants to go further stays there
            free = ~(((u >= 1.0) & (gradient < 0)) | ((u <= 0.0) & (gradient > 0)))
            jacobian = jacobian * free
            normal = jacobian.T @ jacobian
            before = loss
            while damping < 1e8:
                scale = normal.diagonal() + 1e-12 * normal.trace() + 1e-30
                step = torch.linalg.solve(normal + damping * scale.diag(), -gradient * free)
                tried = (u + step).clamp(0.0, 1.0)
                r_tried = self.residuals(tried)
                reached = r_tried.square().sum().item()
                if reached < loss:  # NaN is not
                    u, r, loss, damping = tried, r_tried, reached, damping * 0.2
                    break
                damping *= 5.0
            if loss > before * (1.0 - 1e-8):
                break
        return loss, u

    def jacobian(self, u: Tensor, r: Tensor) -> Tensor:
        """(count, 3) by differences that stay inside the box."""
        columns = []
        for i in range(3):
            h = -1e-6 if u[i] > 0.5 else 1e-6
            moved = u.clone()
            moved[i] += h
            columns.append((self.residuals(moved) - r) / h)
        return torch.stack(columns, dim=1)


# The box. A stable quintic is told by where p has its maximum (log-spaced), by the ratio of the
# squares of its two critical points (1: none left; 5: it touches 0), and by how high the maximum
# is: from 1 to the highest M that is stable with MARGIN, p((1 + MARGIN) M) = M.
_PEAK = (0.05, 1.5)
_RATIO = (1.0, 4.9)
_SPARE = 1.0 + 1.02 * MARGIN  # a little more than is checked, for rounding to _DIGITS


def _to_row(u: Tensor) -> Row:
    place, shape, height = u.tolist()
    peak = _PEAK[0] * (_PEAK[1] / _PEAK[0]) ** place
    ratio = _RATIO[0] + (_RATIO[1] - _RATIO[0]) * shape
    limit = peak * _level(ratio) / _SPARE
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
    a, b, c = row
    root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
    low, high = (-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)
    if low <= 0.0:
        return torch.full((3,), 0.5, dtype=torch.float64)
    peak, ratio = math.sqrt(low), min(high / low, _RATIO[1])
    top = peak * (a + low * (b + low * c))
    limit = peak * _level(ratio) / _SPARE
    height = math.log(max(top, 1.0)) / math.log(limit) if limit > 1.0 else 1.0
    place = math.log(peak / _PEAK[0]) / math.log(_PEAK[1] / _PEAK[0])
    shape = (ratio - _RATIO[0]) / (_RATIO[1] - _RATIO[0])
    return torch.tensor([place, shape, height], dtype=torch.float64).clamp(0.0, 1.0)


def _level(ratio: float) -> float:
    """The x beyond both critical points where a p with its maximum at 1 is as high again."""
    top = (10.0 * ratio - 2.0) / 3.0
    x = 2.0 + ratio
    for _ in range(50):  # Newton's method from above, where p is convex
        y = x * x
        value = x * (5.0 * ratio + y * (y - (5.0 / 3.0) * (1.0 + ratio))) - top
        moved = value / (5.0 * (y - 1.0) * (y - ratio))
        x -= moved
        if moved < 1e-13:
            break
    return x


def _coarse(sigmas: Tensor, weights: Tensor, steps: int) -> list[Tensor]:
    """The lowest valleys of a grid over the box, on 128 quantiles of the singular values."""
    order = sigmas.argsort(stable=True)
    mass = weights[order].cumsum(0)
    wanted = (torch.arange(128, dtype=torch.float64) + 0.5) / 128 * mass[-1]
    picked = sigmas[order[torch.searchsorted(mass, wanted).clamp_max(len(order) - 1)]]
    grid, rows = _grid()
    x = picked.expand(len(rows), -1)
    for _ in range(steps):
        y = x * x
        x = x * (rows[:, :1] + y * (rows[:, 1:2] + y * rows[:, 2:]))
    error = (x - 1.0).square().mean(1).nan_to_num(math.inf, math.inf)
    # one start for each valley
    valley = -torch.nn.functional.max_pool3d(-error.view(1, 1, *_GRID), 3, stride=1, padding=1)
    error = torch.where(error == valley.view(-1), error, math.inf)
    chosen = error.argsort(stable=True)[:_POLISHED]
    return [grid[i] for i in chosen[error[chosen].isfinite()].tolist()]


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Points of the box, and their rows."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in _GRID]
    grid = torch.cartesian_prod(*axes)
    return grid, torch.tensor([_to_row(u) for u in grid], dtype=torch.float64)


def _is_sound(row: Row, margin: float) -> bool:
    try:
        check_fixed(row, margin=margin)
    except ValueError:
        return False
    return True


def _checked(sigmas: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both flat, float64 and on the CPU; the weights sum to 1."""
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
