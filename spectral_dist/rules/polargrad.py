"""PolarGrad (arXiv 2505.21799): the polar factor times the nuclear norm of the matrix."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spectral_dist.rules.base import MatrixOps, Rule, Shape, StateSpec
from spectral_dist.rules.fields import flag, number, option
from spectral_dist.rules.options import PolarOptions
from spectral_dist.rules.registry import register


@dataclass(frozen=True)
class PolarGradOptions(PolarOptions):
    """PolarGrad's options."""

    polar: str | Sequence[Sequence[float]] = option(
        "qdwh", "Polar method, or a schedule of your own, [[a, b, c], ...].", lambda value: None
    )
    polar_first: bool = flag(
        False, "Orthogonalize the gradient, and average polar factors.", shapes_state=True
    )
    nu_power: float = number(1.0, "Power of the nuclear norm: 1 in the paper, 0 is Muon.")


@register("polargrad")
class PolarGrad(Rule[PolarGradOptions]):
    """Keep the size of the gradient: the step is 1-homogeneous in G (arXiv 2505.21799).

    Momentum first:  M <- beta M + (1 - beta) G;  U = polar(M);  nu = <M, U>^alpha;
                     W <- (1 - lr wd) W - lr nu U
    Polar first:     U = polar(G);  nu = <G, U>^alpha;  M <- beta M + (1 - beta) U;
                     W <- (1 - lr wd) W - lr nu M

    With an inexact polar factor nu = sum of s_i s'_i, s the singular values of the matrix and s'
    those of its factor. Polar first, M averages polar factors, and is kept where the whole matrix
    is.
    """

    example = "lr=1e-3, momentum=0.95"

    def prepare(self, options: PolarGradOptions, shapes: Mapping[str, Shape]) -> PolarGradOptions:
        """Return the options unchanged; warn of one that has no effect with ``polar_first``."""
        if options.polar_first and options.replicate_momentum:
            warnings.warn(
                "replicate_momentum has no effect with polar_first: that momentum is kept where the"
                " whole matrix is, and spectral_dist.checkpoint saves it",
                stacklevel=5,
            )
        return options

    def has_momentum(self, options: PolarGradOptions) -> bool:
        """Return whether the momentum averages gradients, which is shard state."""
        return not options.polar_first

    def state(self, options: PolarGradOptions, shape: Shape) -> dict[str, StateSpec]:
        """Return the momentum of polar factors if ``polar_first``, else nothing."""
        if not options.polar_first:
            return {}
        return {"moment": StateSpec(shape, "matrix", formerly="exp_avg")}

    def direction(self, options: PolarGradOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return nu U, or with ``polar_first`` nu M, in nu's dtype, at least float32."""
        factors = ops.polar(matrices)
        nuclear = ops.inner(matrices, factors).clamp_min(0.0)
        if options.nu_power != 1:
            # in float64, as the bits of a power depend on how many there are
            nuclear = nuclear.double().pow(options.nu_power).to(nuclear.dtype)
        if options.polar_first:
            momentum = ops.state["moment"]
            momentum.lerp_(factors.to(momentum.dtype), 1 - options.momentum)
            factors = momentum
        return factors * nuclear[:, None, None]
