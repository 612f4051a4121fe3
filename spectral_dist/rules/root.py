"""ROOT (arXiv 2511.20626): outliers clamped, and a polynomial for each shape of matrix."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from spectral_dist.polar import coefficients, fit, spectra, stability
from spectral_dist.polar.schedules import MOST_STEPS
from spectral_dist.rules.base import MatrixOps, PolarSpec, Pooling, Shape
from spectral_dist.rules.fields import option, whole
from spectral_dist.rules.nesterov import NesterovRule
from spectral_dist.rules.options import ComputedOptions, NesterovOptions
from spectral_dist.rules.registry import register


def _quantile_problem(value: object) -> str | None:
    """Return what is wrong with a quantile, or None."""
    is_valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    return None if is_valid else "it must be a number above 0 and at most 1, which clamps nothing"


def _coefficients_problem(value: object) -> str | None:
    """Return what is wrong with a source of coefficients, or None."""
    is_valid = isinstance(value, str | Mapping)
    return (
        None if is_valid else "it must be a name: 'published', 'jordan' or a file of `calibrate`'s"
    )


@dataclass(frozen=True)
class ROOTOptions(NesterovOptions, ComputedOptions):
    """ROOT's options."""

    polar_steps: int = whole(5, "Newton-Schulz steps.", most=MOST_STEPS)
    quantile: float = option(
        0.9, "Elements beyond this quantile of magnitudes are clamped; 1 clamps nothing.",
        _quantile_problem,
    )  # fmt: skip
    coefficients: str | Mapping[str, list[float]] = option(
        "published", "'published', 'jordan' or a file that `spectral-dist calibrate` wrote.",
        _coefficients_problem, str, learned=True,
    )  # fmt: skip
    adapt_every: int = whole(
        0, "Fit the coefficients anew in every so many steps; 0 never.", least=0, scope="optimizer"
    )

    def check(self, where: str) -> None:
        """Check all options, and that the strategy leaves whole matrices where they are needed.

        Raises:
            ValueError: names the option; begins with ``where``.
        """
        super().check(where)
        if self.strategy == "block":
            why = "ROOT's quantile and coefficients are those of whole matrices"
            self.invalid(where, "strategy", f"{why}; write 'owner' or 'gram'")
        if self.strategy in ("gram", "split") and self.adapt_every:
            why = "no rank has a whole matrix to take the spectrum of"
            self.invalid(where, "strategy", f"{why}; write 'owner', or adapt_every=0")


@register("root")
class ROOT(NesterovRule[ROOTOptions]):
    """Clamp outliers, and iterate with coefficients of each shape (arXiv 2511.20626).

    M <- beta M + (1 - beta) G;  X = M or its Nesterov form;  eps = the q-quantile of |X|;
    B = clamp(X, -eps, eps);  U = AdaNewton(B);  W <- (1 - lr wd) W - lr s U

    The paper accumulates M <- beta M + G, which only scales X: neither B's direction nor U depends
    on it. The quantile is that of the whole matrix. AdaNewton takes polar_steps steps of one
    (a, b, c) for each shape (min, max). The coefficients are in the parameter groups, and so in
    checkpoints; with ``adapt_every`` they are fitted to the spectra of that step, over all ranks,
    and serve from the next step on.
    """

    example = "lr=0.02, quantile=0.9"
    quantities: ClassVar[Mapping[str, str]] = {
        "clamped_fraction": "of its elements beyond the quantile"
    }

    def prepare(self, options: ROOTOptions, shapes: Mapping[str, Shape]) -> ROOTOptions:
        """Return the options with the coefficients of every shape in place of a name or file.

        Raises:
            ValueError: there are none for a shape.
        """
        if isinstance(options.coefficients, str):
            table = coefficients_of_shapes(
                options.coefficients, sorted(set(shapes.values())), options.polar_steps
            )
            return replace(options, coefficients=table)
        for shape in shapes.values():
            if coefficients.key(shape) not in options.coefficients:
                raise ValueError(
                    f"coefficients has nothing for matrices of {shape}; write 'published', 'jordan'"
                    " or a file that `spectral-dist calibrate` wrote for this model"
                )
        return options

    def polar(self, options: ROOTOptions, shape: Shape) -> PolarSpec:
        """Return AdaNewton with the coefficients of this shape."""
        table = options.coefficients
        assert isinstance(table, Mapping), "a group is prepared before its matrices are planned"
        row = table[coefficients.key(shape)]
        return PolarSpec([row] * options.polar_steps, None, options.polar_dtype)

    def direction(self, options: ROOTOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return U of each matrix of (k, m, n)."""
        clamped = matrices
        if options.quantile < 1:
            wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            limits = ops.quantile(wide.abs(), options.quantile)[:, None, None]
            clamped = torch.clamp(wide, -limits, limits)
            ops.note("clamped_fraction", lambda: ops.fraction(wide.abs() > limits))
        ops.pool(lambda: spectra.histogram(clamped))
        return ops.polar(clamped)

    def pooling(self, options: ROOTOptions) -> Pooling | None:
        """Return the sum of the histograms of singular values, in the steps that adapt to it."""
        if not options.adapt_every:
            return None
        return Pooling("adapt_every", options.adapt_every, spectra.BINS)

    def adapt(self, options: ROOTOptions, pooled: Mapping[Shape, Tensor]) -> ROOTOptions:
        """Return the options with coefficients fitted to the histograms of all ranks."""
        table = dict(options.coefficients) if isinstance(options.coefficients, Mapping) else {}
        for shape, weights in pooled.items():
            key = coefficients.key(shape)
            if key in table and weights.any():
                a, b, c = table[key]
                row = fit.fit(spectra.CENTERS, weights, steps=options.polar_steps, start=(a, b, c))
                table[key] = list(row)
        return replace(options, coefficients=table)


def coefficients_of_shapes(source: str, shapes: list[Shape], steps: int) -> dict[str, list[float]]:
    """Return (a, b, c) of each shape, by "MINxMAX".

    As in the paper, a shape that is not published gets jordan's. A published triple that diverges
    is replaced by jordan's as well, with a warning.

    Args:
        source: 'published', 'jordan' or a file.
        shapes: (m, n) of the matrices.
        steps: Newton-Schulz steps that they are for.

    Raises:
        ValueError: a file that cannot be read, is not sound, is for another number of steps or
            lacks a shape.
    """
    published = {"published": fit.PUBLISHED, "jordan": {}}
    table = published[source] if source in published else coefficients.read(source, steps)
    chosen: dict[str, list[float]] = {}
    for shape in shapes:
        name = coefficients.key(shape)
        if source not in published and (min(shape), max(shape)) not in table:
            raise ValueError(
                f"coefficients: {source} has none for {name}; run `spectral-dist calibrate` with"
                f" --shape {name}, or with the model's --model"
            )
        row = coefficients.row_of_shape(shape, table)
        try:
            stability.check_fixed(row)
        except ValueError as error:
            warnings.warn(
                f"coefficients: ROOT's published triple for {name} is unsafe, so jordan's"
                f" {fit.FALLBACK} is used instead; `spectral-dist calibrate` makes a better"
                f" one. {error}",
                stacklevel=5,
            )
            row = fit.FALLBACK
        chosen[name] = list(row)
    return chosen
