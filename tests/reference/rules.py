"""Slow, obvious steps of every rule, written from the specs and sharing nothing with the package.

A rule takes one step on one whole matrix in place: ``rule(w, g, m, o, polar)`` with the weight, the
gradient, the momentum, the options by name, and the oracle, a function from a matrix to its polar
factor. Everything is computed in the momentum's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference import polar as formulas

Oracle = Callable[[Tensor], Tensor]
Rule = Callable[[Tensor, Tensor, Tensor, dict[str, Any], Oracle | None], None]

# -- oracles


def svd(x: Tensor) -> Tensor:
    """U V^T in float64, rounded once; directions that the matrix has not are left out."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = s > s[0] * max(x.shape) * torch.finfo(torch.float64).eps
    return ((u * keep) @ vh).to(x.dtype)


def newton_schulz(coefficients: list[tuple[float, float, float]], start: float = 1.0) -> Oracle:
    """X <- a X + b X X^T X + c (X X^T)^2 X from X / (start ||X||_F), in the dtype of X."""

    def polar(x: Tensor) -> Tensor:
        largest = x.abs().max()
        if largest == 0:
            return x.clone()
        x = x / largest
        x = x / (x.norm() * start)
        tall = x.shape[0] > x.shape[1]
        x = x.mT if tall else x
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x

    return polar


def schedule(name: str, steps: int | None = None) -> Oracle:
    """A named schedule of tests/reference/polar.py."""
    steps = formulas.NATURAL_STEPS[name] if steps is None else steps
    rows = [formulas.coefficients(name, step) for step in range(steps)]
    return newton_schulz(rows, formulas.start_norm(name))


def oracle(name: str) -> Oracle:
    """The oracle that an option ``polar=name`` must agree with."""
    exact = ("svd", "eigh", "qdwh", "zolo")
    return svd if name in exact else schedule(name.removeprefix("gram_"))


# -- what the rules share


def average(m: Tensor, g: Tensor, beta: float) -> None:
    """M <- beta M + (1 - beta) G."""
    m.copy_(beta * m + (1 - beta) * g)


def looked_ahead(m: Tensor, g: Tensor, o: dict[str, Any]) -> Tensor:
    """Nesterov's (1 - beta) G + beta M with the new M, or M itself."""
    beta = o.get("momentum", 0.95)
    return (1 - beta) * g + beta * m if o.get("nesterov", True) else m


def decay_and_move(w: Tensor, direction: Tensor, o: dict[str, Any]) -> None:
    """W <- (1 - lr wd) W - lr direction; a weight of half precision is rounded once."""
    wide = w.to(direction.dtype)
    w.copy_((1 - o["lr"] * o["weight_decay"]) * wide - o["lr"] * direction)


def scale(o: dict[str, Any], m: int, n: int) -> float:
    """What an orthogonal direction of an m x n matrix is multiplied by."""
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "original": math.sqrt(max(1, m / n)),
        "spectral": math.sqrt(m / n),
        "none": 1.0,
    }[o.get("scale", "match_rms_adamw")]


# -- the rules


def muon(w: Tensor, g: Tensor, m: Tensor, o: dict[str, Any], polar: Oracle | None = None) -> None:
    g = g.to(m.dtype)
    average(m, g, o.get("momentum", 0.95))
    u = (polar or schedule("jordan"))(looked_ahead(m, g, o))
    decay_and_move(w, scale(o, *w.shape) * u, o)


def polargrad(
    w: Tensor, g: Tensor, m: Tensor, o: dict[str, Any], polar: Oracle | None = None
) -> None:
    """arXiv 2505.21799; ``polar_first`` orthogonalizes the gradient and averages the factors."""
    polar = polar or svd
    g, beta = g.to(m.dtype), o.get("momentum", 0.95)
    if o.get("polar_first", False):
        u = polar(g)
        nuclear = (g * u).sum()
        average(m, u, beta)
        u = m
    else:
        average(m, g, beta)
        u = polar(m)
        nuclear = (m * u).sum()
    power = nuclear.clamp_min(0.0) ** o.get("nu_power", 1.0)
    decay_and_move(w, power * u, o)


def quantile(x: Tensor, q: float) -> float:
    """Of the numbers of x, sorted: at place q (N - 1), linear between neighbours."""
    numbers = x.flatten().double().sort().values
    place = q * (len(numbers) - 1)
    low = math.floor(place)
    high = min(low + 1, len(numbers) - 1)
    a, b = numbers[low].item(), numbers[high].item()
    return a + (place - low) * (b - a)


PUBLISHED = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
OTHER = (3.4445, -4.7750, 2.0315)
UNSAFE = (2048, 2048)
"""Its local maximum lies above its unstable fixed point; an implementation must refuse it."""


def root(w: Tensor, g: Tensor, m: Tensor, o: dict[str, Any], polar: Oracle | None = None) -> None:
    """arXiv 2511.20626: clamp at a quantile of the magnitudes, then one triple for all steps.

    ``o["triples"]``: (shorter side, longer side) -> (a, b, c) in place of the published ones.
    """
    g = g.to(m.dtype)
    average(m, g, o.get("momentum", 0.95))
    asked = looked_ahead(m, g, o)
    limit = quantile(asked.abs(), o.get("quantile", 0.9))
    shape = (min(w.shape), max(w.shape))
    triple = o.get("triples", PUBLISHED).get(shape, OTHER)
    polar = polar or newton_schulz([triple] * o.get("polar_steps", 5))
    decay_and_move(w, scale(o, *w.shape) * polar(asked.clamp(-limit, limit)), o)


RULES: dict[str, Rule] = {"muon": muon, "polargrad": polargrad, "root": root}
