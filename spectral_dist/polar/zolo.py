"""ZOLO-PD: the polar factor by at most two Zolotarev rational functions, in float64.

The r terms of a function are independent of each other, which is what the method is for; here they
are computed one after the other, so that memory does not grow with r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from spectral_dist.polar.qdwh import (
    QR_ABOVE,
    can_sharpen,
    on_short_side,
    qr_term,
    sharpen,
    solve,
    unit_spectral,
)
from spectral_dist.polar.scaling import near_one, null_cutoff

_EPS = torch.finfo(torch.float64).eps

_DEGREES = (
    (1.001, 2),
    (1.01, 3),
    (1.1, 4),
    (1.2, 5),
    (1.5, 6),
    (2.0, 8),
    (6.5, 2),
    (180.0, 3),
    (1.5e4, 4),
    (2e6, 5),
    (1e9, 6),
    (3e12, 7),
    (math.inf, 8),
)
"""(largest condition number, its degree r): up to condition number 2 one function of degree r is
enough, beyond it takes two of the same r."""


@dataclass(frozen=True, slots=True)
class Zolotarev:
    """The function f(x) = x (1 + sum_j weights[j] / (x^2 + poles[j])) / gain.

    Attributes:
        poles: ascending.
        weights: one for each pole.
        gain: f(1) before it is divided by it.
        condition: condition number of X X^T + poles[0] I, the worst of the r inverses.
        lower_image: f maps [lower, 1] to [lower_image, 1].
    """

    poles: tuple[float, ...]
    weights: tuple[float, ...]
    gain: float
    condition: float
    lower_image: float


def polar_by_zolo(x: Tensor, lower: float | None = None) -> Tensor:
    """Return U V^T of x (k, m, n), computed and returned in float64.

    Nakatsukasa and Freund, SIAM Review 58 (2016); arXiv 2505.21799.

    Args:
        x: (k, m, n), any floating dtype.
        lower: bound of the singular values of ``unit_spectral`` from below. Singular values from a
            fifth of the bound on come out as 1 within rounding, those up to a fiftieth as 0, those
            in between as in ``polar_by_qdwh``. None is five times ``null_cutoff``: what is up to a
            tenth of that cutoff comes out as 0, what is from it on as 1.
    """
    if lower is None:
        lower = min(5.0 * null_cutoff(x.shape, x.dtype), 1.0)
    return on_short_side(
        near_one(x, torch.float64), partial(_apply, steps=zolotarev_functions(lower))
    )


def degree(condition: float) -> int:
    """Return the number of terms r for singular values in [1 / condition, 1]."""
    return next(r for limit, r in _DEGREES if condition <= limit)


@lru_cache(maxsize=64)
def zolotarev_functions(lower: float) -> tuple[Zolotarev, ...]:
    """Return the one or two functions that take [lower, 1] as near to 1 as ``sharpen`` needs."""
    r = degree(1.0 / lower)
    steps: list[Zolotarev] = []
    while not can_sharpen(lower, _EPS) and len(steps) < 2:
        steps.append(zolotarev(lower, r))
        lower = steps[-1].lower_image
    return tuple(steps)


def zolotarev(lower: float, r: int) -> Zolotarev:
    """Return Zolotarev's function of type (2r + 1, 2r) on [lower, 1], scaled to a maximum of 1."""
    k, k1 = elliptic_k(lower), elliptic_k(math.sqrt((1.0 - lower) * (1.0 + lower)))
    # the usual c_i for [1, 1 / lower] are these over lower^2
    c = [(lower * _sc(i * k / (2 * r + 1), k, k1, lower)) ** 2 for i in range(1, 2 * r + 1)]
    zeros, poles = c[1::2], c[0::2]
    weights = []
    for j, pole in enumerate(poles):
        weight = zeros[j] - pole
        for other in range(r):
            if other != j:
                # ratio by ratio, because the products of all differences span 1e-250 to 1
                weight *= (pole - zeros[other]) / (pole - poles[other])
        weights.append(weight)

    def f(x: float) -> float:
        """Return the function at x before it is scaled."""
        return x * math.prod((x * x + z) / (x * x + p) for z, p in zip(zeros, poles, strict=True))

    condition = (1.0 + poles[0]) / (lower * lower + poles[0])
    return Zolotarev(tuple(poles), tuple(weights), f(1.0), condition, min(f(lower) / f(1.0), 1.0))


def elliptic_k(complement: float) -> float:
    """Return K, the complete elliptic integral of the first kind.

    Computed by the arithmetic-geometric mean: 6 rounds at 1e-15. scipy.special.ellipk takes the
    parameter m = 1 - complement^2, which is 1 in float64 below 1e-8, and ellipkm1 takes
    complement^2.

    Args:
        complement: the complementary modulus, in (0, 1].
    """
    a, b = 1.0, complement
    while a - b > 1e-15 * a:  # the two means of numbers that differ by e differ by e^2
        a, b = 0.5 * (a + b), math.sqrt(a * b)
    return math.pi / (a + b)


def _sc(u: float, k: float, k1: float, lower: float) -> float:
    """Return sn(u) / cn(u) for the complementary modulus ``lower``.

    scipy.special.ellipj takes the parameter 1 - lower^2, which is 1 in float64 below 1e-8; at 1e-5
    it is right to 8 digits, at 1e-7 to 4. So this uses Jacobi's imaginary transformation, then the
    Fourier series of sn, all of whose terms are positive then: one or two of them for small
    ``lower``, at most 3000 (for 1 - 1e-15).

    Args:
        u: the argument.
        k: K of u's modulus.
        k1: K of ``lower``.
        lower: the complementary modulus.
    """
    half = 0.5 * math.pi / k1
    total, n, term = 0.0, 1, math.inf
    while term > 1e-18 * total:
        term = (math.exp(-n * half * (k - u)) - math.exp(-n * half * (k + u))) / -math.expm1(
            -2 * n * half * k
        )
        total += term
        n += 2
    return math.pi / (lower * k1) * total


def _apply(w: Tensor, steps: Sequence[Zolotarev]) -> Tensor:
    """Apply each function to the singular values of w (k, s, l), then ``sharpen``."""
    w = unit_spectral(w)
    for f in steps:
        step = w / f.gain
        if f.condition <= QR_ABOVE:
            gram = torch.bmm(w, w.mT, out=w.new_empty(*w.shape[:-1], w.shape[-2]))
        for pole, weight in zip(f.poles, f.weights, strict=True):
            if f.condition > QR_ABOVE:
                root = math.sqrt(pole)
                step.add_(qr_term(w, 1.0 / root), alpha=weight / (root * f.gain))
            else:
                shifted = gram.clone()
                shifted.diagonal(dim1=-2, dim2=-1).add_(pole)
                step.add_(solve(shifted, w), alpha=weight / f.gain)
        w = step
    return sharpen(w)
