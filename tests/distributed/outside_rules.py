"""Two rules that are not of the package: one without a polar factor, one with all kinds of state.

Imported, and so registered, on ranks and in processes of their own only: other tests count rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_dist.rules.base import MatrixOps, Rule, Shape, StateSpec
from spectral_dist.rules.fields import choice, flag, number, whole
from spectral_dist.rules.options import MatrixOptions, PolarOptions
from spectral_dist.rules.registry import register


@dataclass(frozen=True)
class RowSignOptions(MatrixOptions):
    """Options of RowSign."""

    softness: float = number(1.0, "Of a row's mean size, where a sign is one half.", above=True)
    warm: bool = flag(False, "Whether the momentum is added to its own gradient.")


@register("rowsign")
class RowSign(Rule[RowSignOptions]):
    """Descend along soft signs: x / (|x| + softness times the mean of |x| over the row).

    Hard signs of numbers that are nearly zero would not be the same on two machines.
    """

    def update_input(
        self, options: RowSignOptions, momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return M, or M + G."""
        return list(torch._foreach_add(momenta, grads)) if options.warm else list(momenta)

    def direction(self, options: RowSignOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return soft signs."""
        sizes = matrices.abs()
        means = ops.row_sums(sizes)[..., None] / ops.shape[1]
        tiny = torch.finfo(matrices.dtype).tiny
        return matrices / (sizes + options.softness * means).clamp_min(tiny)


@dataclass(frozen=True)
class LaggingOptions(PolarOptions):
    """Options of Lagging."""

    row_decay: float = number(0.9, "Decay of the mean squares of rows.", below=1.0)
    lag: float = number(0.3, "Factor of the direction before.", below=1.0)
    limit: int = whole(4, "Steps that the size is a mean of.", unit="steps")
    shape_by: str = choice("rows", ("rows", "nothing"), "What is made even.", "shape")


@register("lagging")
class Lagging(Rule[LaggingOptions]):
    """Even out the rows of polar factors, shrink them where the momentum does, and lag behind.

    Keeps ``rows``, cut with the matrix's rows, ``before``, cut as the matrix, ``size``, at the
    owner, and ``count``, everywhere.
    """

    def state(self, options: LaggingOptions, shape: Shape) -> dict[str, StateSpec]:
        """Return one of every kind."""
        return {
            "rows": StateSpec((shape[0], 1), "rows"),
            "before": StateSpec(shape, "matrix"),
            "size": StateSpec((1,), "owner"),
            "count": StateSpec((), "all", torch.int64),
        }

    def direction(self, options: LaggingOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return share * (even rows + lag * what was before)."""
        rows, before, size = (ops.state[name] for name in ("rows", "before", "size"))
        factors = ops.polar(matrices).to(rows.dtype)
        means = ops.row_sums(factors.square())[..., None] / ops.shape[1]
        rows.lerp_(means, 1 - options.row_decay)
        even = factors / (rows.sqrt() + 1e-3) if options.shape_by == "rows" else factors
        tiny = torch.finfo(rows.dtype).tiny

        def shares(squares: Tensor, places: list[int]) -> Tensor:
            """Of the momentum's size in its running mean, (j, 1), at the owner."""
            sizes = squares.sqrt()
            size[places] += (sizes - size[places]) / options.limit
            return sizes / (sizes + size[places]).clamp_min(tiny)

        squares = matrices.to(rows.dtype).square().sum((1, 2))[:, None]
        share = ops.at_owner(squares, shares)[..., None]
        ops.state["count"].add_(1)
        direction = share * (even + options.lag * before)
        before.copy_(direction)
        return direction

    def scale(self, options: LaggingOptions, shape: Shape) -> float:
        """Return the square root of the short side over the long one's."""
        return float((min(shape) / max(shape)) ** 0.5)
