"""SUMO (arXiv 2505.24749) from specs/sumo.md: one matrix at a time, every basis and factor by SVD.

Everything is computed in the gradient's dtype; null directions are those of float32, as the
package's are, so that both leave out the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference import rules

EPS = 2.0**-23
DEFAULTS = {"rank": 0.25, "refresh_below": 0.0, "momentum": 0.95, "limiter": 1.1, "perp_scale": 1.0}


def number(rank: float, m: int, n: int) -> int:
    """r of an m x n matrix: a number of directions, or a fraction of its short side."""
    asked = rank if isinstance(rank, int) else max(1, round(rank * min(m, n)))
    return min(asked, m, n)


def basis(g: Tensor, r: int) -> Tensor:
    """The r left singular vectors of the largest singular values; zero for null directions."""
    u, s, _ = torch.linalg.svd(g, full_matrices=False)
    return u[:, :r] * (s[:r] > EPS * max(g.shape) * s[0])


def polar(x: Tensor) -> Tensor:
    """U V^T without null directions."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * (s > EPS * max(x.shape) * s[0])) @ vh


def scale(o: dict[str, Any], m: int, n: int, r: int) -> float:
    """What Q O of an m x n (out x in) matrix is multiplied by."""
    if o.get("scale", "match_rms_adamw") == "match_rms_adamw":
        return 0.2 * math.sqrt(m * n / r)
    return rules.scale(o, m, n)


class Sumo:
    """State and steps of one matrix.

    Args:
        o: options by name.
        due: whether the basis is taken anew at a step, counted from 0; at 0 it always is.
    """

    def __init__(self, o: dict[str, Any], due: Callable[[int], bool]) -> None:
        self.o, self.due = {**DEFAULTS, **o}, due
        self.taken = 0
        self.norm = 0.0
        self.limited = 0
        self.basis: Tensor | None = None
        self.moment: Tensor | None = None

    def step(self, w: Tensor, g: Tensor) -> None:
        """One step on the weight, in place; a weight of another dtype is rounded once."""
        turned = w.shape[0] < w.shape[1]
        d = self.direction(g.mT, *w.shape).mT if turned else self.direction(g, *w.shape)
        rules.decay_and_move(w, d, self.o)

    def direction(self, g: Tensor, rows: int, columns: int) -> Tensor:
        """D of a gradient that lies with its long side first.

        One that is zero has no subspace: it leaves the basis as it is.
        """
        o, (m, n) = self.o, g.shape
        r = number(o["rank"], m, n)
        if r == min(m, n):  # nothing is outside, and there is nothing to refresh
            self.basis = torch.eye(m, dtype=g.dtype)
            self.moment = torch.zeros_like(g) if self.moment is None else self.moment
        elif not g.any() and self.basis is None:  # the first step is still to come
            return torch.zeros_like(g)
        elif self.basis is None:
            self.basis = basis(g, r)
            self.moment = torch.zeros(r, n, dtype=g.dtype)
        elif g.any() and (self.due(self.taken) or self._small(g)):
            old, self.basis = self.basis, basis(g, r)
            self.moment = self.basis.mT @ old @ self.moment
        q = self.basis
        inside = q.mT @ g
        self.moment = o["momentum"] * self.moment + inside
        factor = scale(o, rows, columns, r)
        d = o["perp_scale"] * (g - q @ inside) + factor * q @ polar(self.moment)
        most = o["limiter"] * self.norm
        if most > 0 and d.norm() > most:
            self.limited += 1
            d = d * (most / d.norm())
        self.norm = d.norm().item()
        self.taken += 1
        return d

    def _small(self, g: Tensor) -> bool:
        below = self.o["refresh_below"]
        return below > 0 and bool((self.basis.mT @ g).norm() <= below)


class SumoMatrices:
    """Of many matrices by name; ``training.train``'s ``take``."""

    def __init__(self, due: Callable[[str, int], bool]) -> None:
        self.due = due
        self.matrices: dict[str, Sumo] = {}

    def __call__(self, name: str, w: Tensor, g: Tensor, o: dict[str, Any]) -> None:
        if name not in self.matrices:
            self.matrices[name] = Sumo(o, lambda step: self.due(name, step))
        self.matrices[name].o |= o  # lr may have changed
        self.matrices[name].step(w, g.double())


# -- how many numbers optimizers keep of an m x n matrix


def sumo_numbers(m: int, n: int, r: int) -> int:
    """Basis and moment, with a norm and a count of steps beside them."""
    return r * (m + n) + 2


def galore_numbers(m: int, n: int, r: int) -> int:
    """arXiv 2403.03507, table 1: mr + 2nr for m <= n, so the projector is on the short side.

    (Its code projects a tall gradient from the right.) Both of Adam's moments are long side x r.
    """
    return r * min(m, n) + 2 * r * max(m, n)
