"""NorMuon (arXiv 2510.05491): Muon whose rows are divided by their own running size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_dist.rules.base import MatrixOps, Shape, StateSpec
from spectral_dist.rules.fields import number
from spectral_dist.rules.nesterov import NesterovRule
from spectral_dist.rules.options import NesterovOptions, PolarOptions
from spectral_dist.rules.registry import register


@dataclass(frozen=True)
class NorMuonOptions(NesterovOptions, PolarOptions):
    """NorMuon's options."""

    beta2: float = number(0.95, "Decay of the mean squares of rows.", below=1.0)
    row_eps: float = number(1e-8, "Addition to the root of the mean squares of rows.", above=True)

    def check(self, where: str) -> None:
        """Check all options; refuse strategy 'block', under which no rank has whole rows.

        Raises:
            ValueError: names the option; begins with ``where``.
        """
        super().check(where)
        if self.strategy == "block":
            why = "NorMuon's row statistics are those of whole matrices"
            self.invalid(where, "strategy", f"{why}; write 'owner' or 'gram'")


@register("normuon")
class NorMuon(NesterovRule[NorMuonOptions]):
    """Divide Muon's direction by the running size of its rows (arXiv 2510.05491).

    M <- beta M + (1 - beta) G;  O = polar(M or its Nesterov form)
    v <- beta2 v + (1 - beta2) mean over columns of O * O
    D = O / (sqrt(v) + eps);  D <- D |O|_F / |D|_F;  W <- (1 - lr wd) W - lr s D

    v is (m, 1), zero at first and without bias correction: a common factor of it drops out. The
    paper writes .2 lr sqrt(m n) / |D|_F for the last two factors, which is the same where |O|_F is
    sqrt(min(m, n)) exactly; keeping |O|_F is right for an inexact polar factor, too, and lets every
    scale s of Muon's apply.
    """

    example = "lr=0.02, beta2=0.95"

    def state(self, options: NorMuonOptions, shape: Shape) -> dict[str, StateSpec]:
        """Return v, one number for each row."""
        return {"row_squares": StateSpec((shape[0], 1), "rows")}

    def direction(self, options: NorMuonOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return D of each matrix of (k, m, n), in at least float32."""
        factors = ops.polar(matrices)
        wide = factors.to(torch.promote_types(factors.dtype, torch.float32))
        # some methods turn a row of zeros into rounding errors, which would grow to full size here
        is_filled = (matrices != 0).any(-1, keepdim=True).to(wide.dtype)
        sums = ops.row_sums(torch.cat([wide.square().sum(-1, keepdim=True), is_filled]))
        sums, is_filled = sums[..., None].chunk(2)
        is_filled = is_filled.clamp_max(1)
        squares = ops.state["row_squares"]
        squares.lerp_((sums * is_filled / ops.shape[1]).to(squares.dtype), 1 - options.beta2)
        scaled = wide * is_filled / (squares.sqrt() + options.row_eps).to(wide.dtype)
        tiny = torch.finfo(wide.dtype).tiny
        ratio = (ops.inner(wide, wide) / ops.inner(scaled, scaled).clamp_min(tiny)).sqrt()
        return scaled * ratio[:, None, None]
