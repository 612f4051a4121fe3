"""What every rule is: elementwise on shards, with one step on whole matrices in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Handle(Protocol):
    """What a rule may do with a batch of matrices (k, m, n), wherever their elements are.

    What it has in hand may be a slab of each: rows or columns of it, of the same for all, even
    none. ``shape`` is that of the whole matrices.
    """

    shape: tuple[int, int]

    def polar(self, matrices: Tensor, rows: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Their polar factors, by the options' method, or by these (a, b, c)."""

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Their inner products <a, b>, (k,)."""

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """The q-quantile of each one's elements, (k,)."""

    def fraction(self, which: Tensor) -> Tensor:
        """The fraction of each one's elements that are true, (k,)."""

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Tell the monitor, if there is one, a number for each, (k,)."""


class Rule:
    """One optimizer's mathematics. ``options`` is always the parameter group.

    M is the shard state ``exp_avg``. Everything but ``direction`` is elementwise and gets lists of
    flat runs, at least one; only ``direction`` sees whole matrices.
    """

    def absorbs(self, options: dict[str, Any]) -> bool:
        """Whether momentum comes after the polar factor: then ``absorb`` is called."""
        return False

    def accumulate(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """M <- beta M + (1 - beta) G, in place."""
        torch._foreach_lerp_(list(momenta), list(grads), 1 - options["momentum"])

    def request(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """What must be orthogonalized: M."""
        return list(momenta)

    def direction(
        self, options: dict[str, Any], matrices: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor | None]:
        """The direction of each of (k, m, n), and for ``absorb`` a number of each, (k,)."""
        raise NotImplementedError

    def absorb(
        self,
        options: dict[str, Any],
        momenta: Sequence[Tensor],
        directions: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> list[Tensor]:
        """Put the directions into M, in place; what is to be subtracted from the weights."""
        raise NotImplementedError

    def scale(self, options: dict[str, Any], shape: tuple[int, int]) -> float:
        """The factor s of the direction of a whole matrix of this shape."""
        return 1.0

    def settle(
        self,
        options: dict[str, Any],
        lr: float,
        weights: Sequence[Tensor],
        directions: Sequence[Tensor],
        shapes: Sequence[tuple[int, int]],
    ) -> None:
        """W <- (1 - lr wd) W - lr s D, in place. ``shapes`` are those of the whole matrices.

        Half-precision weights are updated in the directions' dtype and rounded once.
        """
        factors = [-lr * self.scale(options, shape) for shape in shapes]
        wide = [
            w.to(d.dtype) for w, d in zip(weights, directions, strict=True)
        ]  # w itself if equal
        torch._foreach_mul_(wide, 1 - lr * options["weight_decay"])
        torch._foreach_add_(wide, list(torch._foreach_mul(list(directions), factors)))
        half = [i for i, weight in enumerate(weights) if wide[i] is not weight]
        if half:
            torch._foreach_copy_([weights[i] for i in half], [wide[i] for i in half])
