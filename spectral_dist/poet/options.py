"""The options of POET, and its registration among the optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectral_dist.rules import registry
from spectral_dist.rules.fields import betas_problem, number, option, whole
from spectral_dist.rules.options import BaseOptions


@dataclass(frozen=True)
class POETOptions(BaseOptions):
    """POET's options. ``lr`` is the skew parameters'; ``weight_decay`` that of all others."""

    betas: tuple[float, float] = option(
        (0.9, 0.999), "Adam's decay of its two moments.", betas_problem, scope="scalar"
    )
    eps: float = number(1e-6, "Adam's addition to the denominator.", scope="scalar")
    merge_every: int = whole(
        400, "Steps from one merge of the rotations to the next.", unit="steps", scope="skew"
    )
    clip_ramp: int = whole(
        0, "Steps after a merge over which the clipping limit rises to its value.", unit="steps",
        least=0, scope="optimizer",
    )  # fmt: skip

    def check(self, where: str) -> None:
        """Check all options, and what concerns the merge and decay.

        Raises:
            ValueError: names the option; begins with ``where``.
        """
        super().check(where)
        if self.clip_ramp > self.merge_every:
            self.invalid(where, "clip_ramp", f"it must be at most merge_every, {self.merge_every}")
        if self.scalar_weight_decay is not None:
            self.invalid(where, "scalar_weight_decay", "write weight_decay: the skew has none")

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Return the kinds of parameters that the optimizer can have."""
        return ("skew", "scalar")

    @classmethod
    def names(cls, kind: str) -> frozenset[str]:
        """Return the options that a parameter group of this kind carries."""
        if kind == "skew":
            return frozenset({"lr", "betas", "eps", "merge_every"})
        return super().names(kind)

    def group_fields(self, kind: str) -> dict[str, Any]:
        """Return the fields of a parameter group of one of ``kinds``; rotations have no decay."""
        carried = super().group_fields(kind)
        return {**carried, "weight_decay": 0.0} if kind == "skew" else carried


registry.add(registry.Entry("poet", "POET", POETOptions, None))
