"""Halley's and Zolotarev's functions on scalars, written from the formulas of the specification."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

# con from which a degree is no longer enough, degree
DEGREES = [(1.001, 2), (1.01, 3), (1.1, 4), (1.2, 5), (1.5, 6), (2, 8),
           (6.5, 2), (180, 3), (1.5e4, 4), (2e6, 5), (1e9, 6), (3e12, 7), (1e300, 8)]  # fmt: skip


def halley_weights(lower: float, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of the first steps for singular values in [lower, 1], to 60 digits inside."""
    rows = []
    with mpmath.workdps(60):
        low = mpmath.mpf(lower)
        for _ in range(steps):
            d = mpmath.cbrt(4 * (1 / low**2 - 1) / low**2)
            s = mpmath.sqrt(1 + d)
            a = s + mpmath.sqrt(2 - d + 2 * (2 - low**2) / (low**2 * s))
            b = (a - 1) ** 2 / 4
            c = a + b - 1
            rows.append((float(a), float(b), float(c)))
            low = low * (a + b * low**2) / (1 + c * low**2)
    return rows


def halley(s: Tensor, rows: list[tuple[float, float, float]]) -> Tensor:
    """Singular values after the steps."""
    s = s.double()
    for a, b, c in rows:
        s = s * (a + b * s**2) / (1 + c * s**2)
    return s


def sharpen(s: Tensor) -> Tensor:
    """Three times the odd polynomial that is flat at 0 and at 1."""
    for _ in range(3):
        s = 2.5 * s**3 - 1.5 * s**5
    return s


def degree(con: float) -> int:
    return next(r for limit, r in DEGREES if con <= limit)


def zolotarev_coefficients(con: float, r: int) -> list[mpmath.mpf]:
    """c_1 ... c_2r for singular values in [1, con], to 60 digits."""
    with mpmath.workdps(60):
        m = 1 - 1 / mpmath.mpf(con) ** 2
        k = mpmath.ellipk(m)
        return [
            (mpmath.ellipfun("sn", i * k / (2 * r + 1), m=m)
             / mpmath.ellipfun("cn", i * k / (2 * r + 1), m=m)) ** 2
            for i in range(1, 2 * r + 1)
        ]  # fmt: skip


def zolotarev_weights(c: list[mpmath.mpf]) -> list[mpmath.mpf]:
    """a_1 ... a_r: - prod_k (c_(2j-1) - c_2k) over prod_(k != j) (c_(2j-1) - c_(2k-1))."""
    odd, even = c[0::2], c[1::2]
    with mpmath.workdps(60):
        return [
            -mpmath.fprod(pole - z for z in even)
            / mpmath.fprod(pole - other for other in odd if other != pole)
            for pole in odd
        ]


def zolotarev(s: list[mpmath.mpf], con: float, iterations: int) -> tuple[list[mpmath.mpf], float]:
    """Singular values in [1, con] after the iterations, not sharpened; and the con reached."""
    r = degree(con)
    with mpmath.workdps(60):
        s, con = [mpmath.mpf(x) for x in s], mpmath.mpf(con)
        for _ in range(iterations):
            c = zolotarev_coefficients(con, r)
            a = zolotarev_weights(c)

            def f(x, a=a, c=c):
                return x * (1 + sum(w / (x**2 + pole) for w, pole in zip(a, c[0::2], strict=True)))

            top = f(mpmath.mpf(1))
            s, con = [f(x) / top for x in s], max(f(con) / top, mpmath.mpf(1))
        return s, con


def norm_bound(x: Tensor) -> float:
    """What x is divided by: the 16-norm of its singular values."""
    return torch.linalg.vector_norm(torch.linalg.svdvals(x.double()), 16).item()


def direction_error(u: Tensor, expected: Tensor) -> float:
    return ((u.double() - expected).norm() / expected.norm()).item()


def orthogonality_error(u: Tensor) -> float:
    u = u.double()
    gram = u @ u.T if u.shape[0] <= u.shape[1] else u.T @ u
    return ((gram - torch.eye(len(gram), dtype=torch.float64)).norm() / len(gram) ** 0.5).item()
