"""A rule of your own: signed momentum where its matrix is tall, Muon's direction where it is wide.

It runs under every layout, with the numbers of one process, because it never learns where a matrix
lives. docs/extending.md says more.

python examples/rule_of_your_own.py
"""

from dataclasses import dataclass

import torch
from one_process import Model, batch
from torch import Tensor, nn

import spectral_dist
from spectral_dist.rules.base import MatrixOps, Rule, Shape
from spectral_dist.rules.fields import flag
from spectral_dist.rules.options import PolarOptions
from spectral_dist.rules.registry import register
from spectral_dist.testing import check_rule


@dataclass(frozen=True)
class HalvesOptions(PolarOptions):
    """Momentum and the polar method, as Muon's, and one more."""

    tall: bool = flag(True, "Take signs where a matrix has more rows than columns.")


@register("halves")
class Halves(Rule[HalvesOptions]):
    """M <- beta M + (1 - beta) G;  W <- W - lr s sign(M), or polar(M) in place of sign(M)."""

    example = "lr=0.02"

    def direction(self, options: HalvesOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return the direction of whole matrices (k, m, n), or of slabs of them."""
        rows, columns = ops.shape
        if options.tall and rows > columns:
            return matrices.sign()
        return ops.polar(matrices)

    def scale(self, options: HalvesOptions, shape: Shape) -> float:
        """Return s: a sign matrix of m x n has the norm of m x n ones."""
        rows, columns = shape
        return columns**-0.5 if options.tall and rows > columns else 1.0


def main() -> None:
    """Train in one process, then prove the rule on 2 ranks."""
    torch.manual_seed(0)
    model = Model()
    optimizer = spectral_dist.Halves(spectral_dist.param_groups(model), lr=0.02, scalar_lr=3e-3)
    for step in range(60):
        tokens, targets = batch(step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"step 60: loss {loss.item():.4f}")
    check_rule(Halves, ranks=2)
    print("equal to one process under every layout")


if __name__ == "__main__":
    main()
