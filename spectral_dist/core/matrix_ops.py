"""What a rule may do with a batch of matrices: whole ones at their owner, or slabs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spectral_dist.core.finite import LastStep
from spectral_dist.core.monitor import Watch
from spectral_dist.polar import null_cutoff, of_gram, polar, reductions, resolve_dtype, rows_of
from spectral_dist.rules.base import PolarSpec, Rule, Shape
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.split import SplitReduction

Observer: TypeAlias = Callable[[Sequence[str], Tensor], None]
"""Called with the names and values (k, m, n) of matrices that are about to be orthogonalized."""


@dataclass
class StepContext:
    """What all batches of one unit share in one step.

    Attributes:
        rule, options: of the parameter group.
        names: of all the unit's matrices.
        observers: of the optimizer.
        watch: where the monitor's quantities of this step are recorded; None: there is no report.
        pooled: sums of ``MatrixOps.pool`` by (short, long) side; None: this step pools nothing.
        last_step: this step, if the device decides whether it changes anything.
        polar_calls: how many matrices were orthogonalized on this rank.
        observer_error: the first error of an observer, which must not be raised inside of the
            exchange, where other ranks would wait for this one.
    """

    rule: Rule[Any]
    options: Any
    names: Sequence[str]
    observers: Sequence[Observer] = ()
    watch: Watch | None = None
    pooled: dict[Shape, Tensor] | None = None
    last_step: LastStep | None = None
    polar_calls: int = 0
    observer_error: Exception | None = field(default=None, repr=False)

    def observe(self, names: Sequence[str], matrices: Tensor) -> None:
        """Call every observer with matrices, (k, m, n), and their names; keep its first error."""
        for observer in self.observers:
            try:
                observer(names, matrices)
            except Exception as error:
                self.observer_error = self.observer_error or error


class WholeMatrixOps:
    """``MatrixOps`` of a batch of whole matrices at their owner.

    Args:
        context: of the step.
        which: the batch, as indices of the unit's matrices.
        shape: (m, n) of each matrix.
        state: the matrix state, stacked.
    """

    def __init__(
        self, context: StepContext, which: Sequence[int], shape: Shape, state: Mapping[str, Tensor]
    ) -> None:
        self.context, self.which, self.shape, self.state = context, which, shape, state
        self.names = [context.names[i] for i in which]

    def polar(self, matrices: Tensor, spec: PolarSpec | None = None) -> Tensor:
        """Return their polar factors."""
        spec = spec or spec_of(self.context, self.shape)
        self.context.polar_calls += len(matrices)
        self.context.observe(self.names, matrices)
        factors = polar(matrices, method=spec.method, steps=spec.steps, compute_dtype=spec.dtype)
        if self.context.watch:
            self.context.watch.record_polar(self.which, matrices, factors)
        return factors

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return their inner products, (k,)."""
        return reductions.inner(a, b)

    def row_sums(self, x: Tensor) -> Tensor:
        """Return the sums of their rows, (k, m)."""
        return x.sum(-1)

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """Return the q-quantile of each one's elements, (k,)."""
        return reductions.quantile(magnitudes, q)

    def fraction(self, mask: Tensor) -> Tensor:
        """Return the fraction of each one's elements that are true, (k,)."""
        return mask.mean((1, 2), dtype=torch.float32)

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """Return what ``evaluate`` makes of the parts: a whole matrix is its only slab."""
        return evaluate(parts, list(range(len(self.which)) if among is None else among))

    def count_polar(self, places: list[int] | None, matrices: Tensor, factors: Tensor) -> None:
        """Count polar factors that the rule computed itself; pass them to observers and monitor.

        Args:
            places: of the matrices in the batch; None: all.
            matrices: what was orthogonalized.
            factors: the polar factors.
        """
        places = list(range(len(self.which))) if places is None else places
        self.context.polar_calls += len(places)
        if places:
            self.context.observe([self.names[k] for k in places], matrices)
        if self.context.watch and places:
            self.context.watch.record_polar([self.which[k] for k in places], matrices, factors)

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Record a quantity for the monitor, if this step is reported."""
        if self.context.watch:
            self.context.watch.record_scalar(self.which, name, values())

    def pool(self, values: Callable[[], Tensor]) -> None:
        """Add values to the sums of matrices of this shape, if this step pools any."""
        pooled = self.context.pooled
        if pooled is not None:
            short, long = sorted(self.shape)
            before = pooled.get((short, long))
            pooled[short, long] = values() if before is None else before + values()


class SlabMatrixOps:
    """``MatrixOps`` of a batch of matrices in slabs; every call is a collective call of the group.

    A matrix is counted, and recorded for the monitor, by the rank that owns it.

    Args:
        context: of the step.
        reduction: of the batch.
        state: the matrix state, stacked.
    """

    def __init__(
        self, context: StepContext, reduction: Reduction, state: Mapping[str, Tensor]
    ) -> None:
        self.context, self._reduction, self.state = context, reduction, state
        self.shape = reduction.shape
        self.names = [context.names[i] for i in reduction.matrices]

    def polar(self, matrices: Tensor, spec: PolarSpec | None = None) -> Tensor:
        """Return slabs of their polar factors."""
        spec = spec or spec_of(self.context, self.shape)
        computed = resolve_dtype(spec.method, spec.dtype, matrices.dtype, matrices.device)
        if isinstance(self._reduction, SplitReduction):
            polynomials = rows_of(spec.method, spec.steps)
            assert polynomials is not None, "strategy.select_teams takes polynomials alone"
            factors = self._reduction.newton_schulz(matrices, *polynomials, computed)
            self.count_polar(None, matrices, factors)
            return factors
        dtype = of_gram.gram_dtype(spec.method, spec.steps, computed)
        cutoff = null_cutoff(self.shape, matrices.dtype)
        evaluate = partial(of_gram.multiplier, method=spec.method, steps=spec.steps, cutoff=cutoff)
        factors = self._reduction.multiply(matrices, dtype, evaluate)
        self.count_polar(None, matrices, factors)
        return factors

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return their inner products over all slabs, (k,)."""
        return self._reduction.add(reductions.inner(a, b))

    def row_sums(self, x: Tensor) -> Tensor:
        """Return the sums of their rows that are here, over all slabs where these cut rows."""
        sums = x.sum(-1)
        return self._reduction.add(sums) if self._reduction.along == 1 else sums

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """Return the q-quantile of each one's elements, (k,)."""
        return self._reduction.quantile(magnitudes, q)

    def fraction(self, mask: Tensor) -> Tensor:
        """Return the fraction of each one's elements that are true, (k,)."""
        count = self._reduction.add(mask.sum((1, 2), dtype=torch.int64))
        return count.float() / (self.shape[0] * self.shape[1])

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """Sum parts over the slabs, evaluate each sum at its owner, and return all results."""
        return self._reduction.at_owner(parts, evaluate, among)

    def count_polar(self, places: list[int] | None, matrices: Tensor, factors: Tensor) -> None:
        """Count polar factors that the rule computed itself.

        Args:
            places: among the matrices that this rank owns, if ``matrices`` are whole; None:
                ``matrices`` are the slabs of the batch.
            matrices: what was orthogonalized.
            factors: the polar factors.
        """
        reduction, context = self._reduction, self.context
        if places is not None:
            which = [reduction.matrices[k] for k in reduction.owned]
            owned = WholeMatrixOps(context, which, self.shape, {})
            owned.count_polar(places, matrices, factors)
            return
        context.polar_calls += len(reduction.owned)
        if context.watch:
            grams = torch.stack([reduction.gram(x.float()) for x in (matrices, factors)])
            gram_sums = reduction.add(grams)
            nuclear = self.inner(matrices, factors)
            if reduction.owned:
                owned_values = (x[reduction.owned] for x in (*gram_sums, nuclear))
                context.watch.record_grams(self._owned(), *owned_values)

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Record a quantity for the monitor, if this step is reported."""
        if self.context.watch:
            numbers = values()  # a collective call, so all ranks make it
            if self._reduction.owned:
                self.context.watch.record_scalar(
                    self._owned(), name, numbers[self._reduction.owned]
                )

    def pool(self, values: Callable[[], Tensor]) -> None:
        """Do nothing: only whole matrices are pooled (``strategy.select_gram``)."""

    def _owned(self) -> list[int]:
        """Return the indices among the unit's matrices of those that this rank owns."""
        return [self._reduction.matrices[k] for k in self._reduction.owned]


def spec_of(context: StepContext, shape: Shape) -> PolarSpec:
    """Return how the rule computes polar factors of matrices of a shape.

    Raises:
        NotImplementedError: the rule has no polar factor, and asks for one.
    """
    spec = context.rule.polar(context.options, shape)
    if spec is None:
        raise NotImplementedError(
            f"{type(context.rule).__name__}.direction asks for a polar factor, but its polar()"
            " names no method"
        )
    return spec
