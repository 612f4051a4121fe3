"""The contract of a rule: elementwise on shards, with one step on whole matrices in between.

A rule is one optimizer's mathematics with its options. It never learns where a matrix lives: what
it receives may be whole matrices or slabs of them, and only ``MatrixOps`` knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from spectral_dist.polar import Method
from spectral_dist.rules import elementwise
from spectral_dist.rules.options import MatrixOptions, PolarOptions

O = TypeVar("O", bound=MatrixOptions)  # noqa: E741  the letter of options, as T is of types
Shape = tuple[int, int]


@dataclass(frozen=True)
class StateSpec:
    """One quantity that a rule keeps of a whole matrix from step to step, zeros at first.

    Attributes:
        shape: of the quantity, for a whole matrix of m x n.
        where: how the quantity lies where a matrix stays in slabs. 'matrix': cut as the matrix is,
            which its shape then is. 'rows', 'columns': its first dimension is the matrix's rows
            (columns), cut with them; where slabs cut the other side, every rank has all of it, and
            the rule makes it equal there. 'all': on every rank. 'owner': at the matrix's owner
            alone.
        dtype: None is float32, or float64 for float64 parameters.
        formerly: the shard state that older releases kept in its place, whose checkpoints load.
    """

    shape: tuple[int, ...]
    where: Literal["matrix", "rows", "columns", "owner", "all"]
    dtype: torch.dtype | None = None
    formerly: str = ""

    def cut_dimension(self, along: int) -> int | None:
        """Return the dimension of the quantity that slabs cut, or None if every rank has all of it.

        Args:
            along: the dimension of the matrix that slabs cut, 0 for rows and 1 for columns.
        """
        if self.where == "matrix":
            return along
        return 0 if (self.where, along) in (("rows", 0), ("columns", 1)) else None


@dataclass(frozen=True)
class PolarSpec:
    """The polar factor that a rule uses, from which follow cost, dtype on the wire and ``gram``.

    Attributes:
        method, steps, dtype: as ``spectral_dist.polar.polar`` takes them.
        rank: None, or for a rule that works in a subspace of the long side alone the subspace's
            dimensions; under ``gram`` rank x short numbers of a matrix are then sent.
    """

    method: Method
    steps: int | None = None
    dtype: str = "auto"
    rank: int | None = None


@dataclass(frozen=True)
class Pooling:
    """A sum over all matrices of the model that a rule asks for every so many steps.

    Attributes:
        setting: the option that asks for it, to name it in errors.
        every: steps from one such sum to the next.
        size: numbers that ``MatrixOps.pool`` gets for each shape.
    """

    setting: str
    every: int
    size: int


class MatrixOps(Protocol):
    """The operations that a rule has on a batch of matrices (k, m, n), wherever their elements are.

    The batch may be a slab of each matrix: rows or columns of it, the same ones for all, even none.

    Attributes:
        shape: (m, n) of the whole matrices.
        names: of the k matrices.
        state: what the rule keeps of them, by ``Rule.state``'s names, each stacked: (k, ...), but
            (j, ...) of what is at owners alone, for the j of them that this rank owns.
    """

    @property
    def shape(self) -> Shape:
        """Return (m, n) of the whole matrices."""

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the k matrices."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return what the rule keeps of the matrices, stacked, by name; change it in place."""

    def polar(self, matrices: Tensor, spec: PolarSpec | None = None) -> Tensor:
        """Return the polar factors (k, m, n), by ``spec`` or, without one, by ``Rule.polar``'s."""

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner products <a, b> of whole matrices, (k,)."""

    def row_sums(self, x: Tensor) -> Tensor:
        """Return the sums over whole rows of x (k, m, n), for the m' rows on this rank: (k, m')."""

    def quantile(self, magnitudes: Tensor, q: float) -> Tensor:
        """Return the q-quantile of each whole matrix's elements, (k,)."""

    def fraction(self, mask: Tensor) -> Tensor:
        """Return the fraction of each whole matrix's elements at which ``mask`` is true, (k,)."""

    def at_owner(
        self,
        parts: Tensor,
        evaluate: Callable[[Tensor, list[int]], Tensor],
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """Sum parts (j, ...) over slabs, each at its matrix's owner, and evaluate the sums there.

        Args:
            parts: one for each matrix of ``among``, (j, ...).
            evaluate: gets the sums (i, ...) of the matrices that this rank owns, and their indices
                in the state that is at owners; returns (i, ...).
            among: indices of the matrices in the batch, ascending; None is all.

        Returns:
            The results of ``evaluate`` for every sum, (j, ...), on every rank.
        """

    def count_polar(self, places: list[int] | None, matrices: Tensor, factors: Tensor) -> None:
        """Count polar factors that were found without ``polar``, and show them to observers.

        The monitor sees them, too.

        Args:
            places: indices of the matrices if ``matrices`` are whole and at owners; None if they
                are the batch, slabs or not.
            matrices: what the factors are of.
            factors: shaped as ``matrices``.
        """

    def note(self, name: str, values: Callable[[], Tensor]) -> None:
        """Give the monitor, if it watches this step, one number for each matrix.

        Args:
            name: one of ``Rule.quantities``.
            values: computes the numbers, (k,).
        """

    def pool(self, values: Callable[[], Tensor]) -> None:
        """Add numbers to the sums of this shape, in a step that pools.

        Args:
            values: computes the numbers, (``Pooling.size``,).
        """


class Rule(Generic[O]):
    """One optimizer's mathematics. M is the momentum, the shard state ``exp_avg``.

    ``update_input``, ``accumulate`` and ``update_weights`` are elementwise, and get lists of flat
    runs of shards, at least one; ``direction`` alone sees whole matrices, or slabs of them.
    """

    options_type: ClassVar[type[MatrixOptions]]
    """Set from the class's own parameter: ``class Muon(Rule[MuonOptions])``."""
    example: ClassVar[str] = ""
    """Keywords of an example, as in ``lr=0.02``."""
    quantities: ClassVar[Mapping[str, str]] = {}
    """The numbers that ``direction`` gives the monitor by ``MatrixOps.note``: name -> meaning."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, MatrixOptions):
                    cls.options_type = argument

    def has_momentum(self, options: O) -> bool:
        """Return whether the rule has M. If not, momenta are empty lists."""
        return True

    def state(self, options: O, shape: Shape) -> dict[str, StateSpec]:
        """Return the quantities that the rule keeps of a whole matrix of this shape beside M."""
        return {}

    def polar(self, options: O, shape: Shape) -> PolarSpec | None:
        """Return how the polar factor of a matrix of this shape is found; None if there is none.

        A rule without one always gets whole matrices.
        """
        if isinstance(options, PolarOptions):
            return PolarSpec(options.polar, options.polar_steps, options.polar_dtype)
        return None

    def prepare(self, options: O, shapes: Mapping[str, Shape]) -> O:
        """Return the options of a group, completed by what depends on its matrices.

        Args:
            options: of the group.
            shapes: (m, n) of each matrix of the group, by name.
        """
        return options

    def can_skip(self) -> bool:
        """Return whether ``accumulate`` and ``update_weights`` take the argument ``skip``.

        Those of this class do. With a rule that has its own, and does not say so here, every step
        waits until the host knows that gradients are finite.
        """
        inherits = (type(self).accumulate, type(self).update_weights)
        return inherits == (Rule.accumulate, Rule.update_weights)

    def accumulate(
        self,
        options: O,
        momenta: Sequence[Tensor],
        grads: Sequence[Tensor],
        skip: Tensor | None = None,
    ) -> None:
        """Update the momenta in place: M <- beta M + (1 - beta) G.

        Args:
            options: of the group.
            momenta: flat runs of shards.
            grads: of each of the momenta, shaped as it.
            skip: 0-d float32 on their device: 1 leaves everything as it is. None, or left out by
                a rule that cannot skip: always update.
        """
        elementwise.average_(momenta, grads, 1 - options.momentum, skip)

    def update_input(
        self, options: O, momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return what is to be orthogonalized: M, or G where there is no M."""
        return list(momenta) if self.has_momentum(options) else list(grads)

    def direction(self, options: O, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return the direction of each matrix.

        A zero matrix must give zeros. The result may be of a wider dtype; a rule does not round.

        Args:
            options: of the group.
            matrices: results of ``update_input``, (k, m, n) or slabs of these.
            ops: the operations on whole matrices.

        Returns:
            A tensor of the shape of ``matrices``.
        """
        raise NotImplementedError

    def scale(self, options: O, shape: Shape) -> float:
        """Return the factor s of the direction of a whole matrix of this shape."""
        return 1.0

    def update_weights(
        self,
        options: O,
        lr: float,
        weights: Sequence[Tensor],
        directions: Sequence[Tensor],
        shapes: Sequence[Shape],
        skip: Tensor | None = None,
    ) -> None:
        """Update the weights in place: W <- (1 - lr wd) W - lr s D.

        Half-precision weights are updated in the directions' dtype and rounded once.

        Args:
            options: of the group.
            lr: of the group in this step.
            weights: flat runs of shards.
            directions: of each of the weights, shaped as it.
            shapes: of the whole matrices that the weights belong to.
            skip: as in ``accumulate``.
        """
        rate_of = {shape: lr * self.scale(options, shape) for shape in set(shapes)}
        # a weight that has the direction's dtype is itself updated, any other by its wider copy
        updated = elementwise.widened(weights, directions[0].dtype)
        elementwise.decay_and_subtract_(
            updated, directions, [rate_of[s] for s in shapes], lr * options.weight_decay, skip
        )
        if updated[0] is not weights[0]:
            torch._foreach_copy_(list(weights), updated)

    def pooling(self, options: O) -> Pooling | None:
        """Return the sum over all matrices of the model that the rule needs, or None."""
        return None

    def adapt(self, options: O, pooled: Mapping[Shape, Tensor]) -> O:
        """Return the options of a group, adapted to numbers that were pooled.

        The result must be the same on every rank, as the numbers are.

        Args:
            options: of the group.
            pooled: the sums (size,), float64 on the CPU, by the (short, long) side of the matrices.
        """
        return options
