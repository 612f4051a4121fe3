"""What every rule is: elementwise on shards, with one step on whole matrices in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """One quantity of matrix state: what a rule keeps of a matrix from step to step.

    ``shape``: for a whole matrix. ``where``: 'slab' if its first dimension is the matrix's long
    side, and is cut as that is where matrices stay in slabs; 'owner' if it is at the owner alone;
    'all' if every rank that has a slab has it. ``dtype``: None is that of the directions.
    """

    shape: tuple[int, ...]
    where: str
    dtype: torch.dtype | None = None


class Handle(Protocol):
    """What a rule may do with a batch of matrices (k, m, n), wherever their elements are.

    What it has in hand may be a slab of each: rows or columns of it, of the same for all, even
    none. ``shape`` is that of the whole matrices, ``names`` are theirs. ``state``: what the rule
    keeps of them, each stacked: (k, ...), but (k', ...) of what is 'owner' of k' of them.
    """

    shape: tuple[int, int]
    names: Sequence[str]
    state: Mapping[str, Tensor]

    def polar(self, matrices: Tensor, rows: Sequence[Sequence[float]] | None = None) -> Tensor:
        """Their polar factors, by the options' method, or by these (a, b, c)."""

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Their inner products <a, b>, (k,)."""

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """The q-quantile of each one's elements, (k,)."""

    def fraction(self, which: Tensor) -> Tensor:
        """The fraction of each one's elements that are true, (k,)."""

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """What ``evaluate`` makes of sums over slabs, (j, ...), each at its owner; (j, ...) too.

        It gets the sums (j', ...) of those that are owned here and their places in the state that
        is at owners. ``among``: which of the matrices in hand, ascending; None is all.
        """

    def orthogonalized(self, places: list[int] | None, matrices: Tensor, factors: Tensor) -> None:
        """Count, and show the monitor, what was orthogonalized without ``polar``.

        ``places``: at owners, of whole matrices; None: what is in hand, slabs or not.
        """

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Tell the monitor, if there is one, a number for each, (k,)."""


class Rule:
    """One optimizer's mathematics. ``options`` is always the parameter group.

    M is the shard state ``exp_avg``. Everything but ``direction`` is elementwise and gets lists of
    flat runs, at least one; only ``direction`` sees whole matrices.
    """

    momentum = True
    """Whether there is M. If not, momenta are empty, and ``accumulate`` is not called."""

    def keeps(self, options: dict[str, Any], shape: tuple[int, int]) -> dict[str, Kept]:
        """The matrix state of a whole matrix of this shape, all zeros before its first step."""
        return {}

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
