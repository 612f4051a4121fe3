"""NorMuon (arXiv 2510.05491) from specs/normuon.md: one matrix at a time, one row after the other.

Everything is computed in the gradient's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference import rules

DEFAULTS = {"momentum": 0.95, "beta2": 0.95, "row_eps": 1e-8, "nesterov": True}


class NorMuonMatrix:
    """State and steps of one matrix.

    Args:
        o: options by name.
        polar: from a matrix to its polar factor.
    """

    def __init__(self, o: dict[str, Any], polar: rules.Oracle | None = None) -> None:
        self.o, self.polar = {**DEFAULTS, **o}, polar or rules.schedule("jordan")
        self.moment: Tensor | None = None
        self.squares: list[float] = []

    def step(self, w: Tensor, g: Tensor) -> None:
        """One step on the weight, in place; a weight of another dtype is rounded once."""
        rules.decay_and_move(w, rules.scale(self.o, *w.shape) * self.direction(g), self.o)

    def direction(self, g: Tensor) -> Tensor:
        """D of a gradient."""
        if self.moment is None:
            self.moment, self.squares = torch.zeros_like(g), [0.0] * len(g)
        rules.average(self.moment, g, self.o["momentum"])
        x = rules.looked_ahead(self.moment, g, self.o)
        factor, beta2 = self.polar(x), self.o["beta2"]
        rows = []
        for i, row in enumerate(factor):
            if not x[i].any():  # nothing was there, whatever rounding has made of it
                row = torch.zeros_like(row)
            mean = sum(element * element for element in row.tolist()) / len(row)
            self.squares[i] = beta2 * self.squares[i] + (1 - beta2) * mean
            rows.append(row / (math.sqrt(self.squares[i]) + self.o["row_eps"]))
        d = torch.stack(rows)
        size = math.sqrt(sum(x * x for x in d.flatten().tolist()))
        return d * (factor.norm().item() / size) if size else d


class NorMuonMatrices:
    """Of many matrices by name; ``training.train``'s ``take``."""

    def __init__(self) -> None:
        self.matrices: dict[str, NorMuonMatrix] = {}

    def __call__(self, name: str, w: Tensor, g: Tensor, o: dict[str, Any]) -> None:
        if name not in self.matrices:
            polar = rules.oracle(o["polar"]) if "polar" in o else None
            self.matrices[name] = NorMuonMatrix(o, polar)
        self.matrices[name].o |= o  # lr may have changed
        self.matrices[name].step(w, g.to(torch.promote_types(w.dtype, torch.float32)))
