"""State of whole matrices, at their owners or in slabs: one stacked tensor for each batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_dist.rules.base import Rule, Shape, StateSpec
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.layout import Layout


@dataclass(frozen=True)
class MatrixStatePart:
    """What this rank stores of one quantity of one matrix.

    Attributes:
        matrix: the matrix's name.
        name: the quantity's name.
        shape: of the whole quantity.
        offsets: of ``values`` in the whole quantity.
        values: a view of the state itself.
        is_primary: whether this is the rank that saves the part; no other one does, even if it has
            the same part.
    """

    matrix: str
    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor
    is_primary: bool


class MatrixState:
    """The state of the matrices that this rank computes in one exchange, all zeros at first.

    Args:
        rule: whose state it is.
        options: of the parameter group.
        layouts: of the matrices.
        exchange: whose batches the state is stacked by.
    """

    def __init__(
        self, rule: Rule[Any], options: MatrixOptions, layouts: Sequence[Layout], exchange: Exchange
    ) -> None:
        self.layouts = layouts
        self._specs: dict[tuple[int, ...], dict[str, StateSpec]] = {}
        self._tensors: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._reductions: dict[tuple[int, ...], Reduction | None] = {}
        for which, reduction in exchange.batches():
            matrix = layouts[which[0]].matrix
            specs = rule.state(options, matrix.read_shape)
            if reduction is not None and matrix.transposed:
                reduction = reduction.transposed()
            self._specs[which], self._reductions[which] = specs, reduction
            self._tensors[which] = {
                name: torch.zeros(
                    stacked_shape(spec, len(which), reduction),
                    dtype=spec.dtype or exchange.state_dtype,
                    # what the host asks for in every step must not wait for the device
                    device="cpu" if spec.dtype == torch.int64 else exchange.device,
                )
                for name, spec in specs.items()
            }

    def of(self, which: Sequence[int]) -> Mapping[str, Tensor]:
        """Return {quantity: tensor stacked over the matrices} of one batch."""
        return self._tensors[tuple(which)]

    def copies(
        self, which: Sequence[int], owned: Sequence[int], wanted: Sequence[int]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return copies of the state of some matrices of a batch.

        Args:
            which: the batch.
            owned: the places in the batch of the matrices that this rank owns.
            wanted: the places in the batch of the matrices whose state is copied.

        Returns:
            (the matrices' parts of the stacked tensor, copies of these) for each quantity.
        """
        places = {k: place for place, k in enumerate(owned)}
        copied = []
        for name, tensor in self.of(which).items():
            at_owner = self._specs[tuple(which)][name].where == "owner"
            rows = [places[k] for k in wanted if k in places] if at_owner else list(wanted)
            parts = [tensor[k] for k in rows]  # by a list of rows a GPU would wait for its copy
            copied.append((parts, [part.clone() for part in parts]))
        return copied

    def parts(self) -> Iterator[MatrixStatePart]:
        """Yield the parts that this rank stores, matrix by matrix."""
        for which, tensors in self._tensors.items():
            reduction = self._reductions[which]
            owned = list(range(len(which))) if reduction is None else reduction.owned
            for k, i in enumerate(which):
                for name, spec in self._specs[which].items():
                    offsets, place = [0] * len(spec.shape), k
                    dimension = None if reduction is None else spec.cut_dimension(reduction.along)
                    if reduction is not None and dimension is not None:
                        offsets[dimension] = reduction.begin
                    if spec.where == "owner":
                        if k not in owned:
                            continue
                        place = owned.index(k)
                    values = tensors[name][place]
                    is_primary = dimension is not None or k in owned
                    matrix = self.layouts[i].matrix.name
                    if values.numel():
                        yield MatrixStatePart(
                            matrix, name, spec.shape, tuple(offsets), values, is_primary
                        )


def stacked_shape(spec: StateSpec, count: int, reduction: Reduction | None) -> tuple[int, ...]:
    """Return the shape of a batch's stacked quantity on this rank.

    Args:
        spec: of the quantity.
        count: the number of matrices of the batch.
        reduction: of the batch, if its matrices are in slabs.
    """
    if reduction is None:
        return (count, *spec.shape)
    if spec.where == "owner":
        return (len(reduction.owned), *spec.shape)
    shape, dimension = list(spec.shape), spec.cut_dimension(reduction.along)
    if dimension is not None:
        shape[dimension] = reduction.length
    return (count, *shape)


def elements(rule: Rule[Any], options: MatrixOptions, shape: Shape) -> int:
    """Count the elements of a matrix's state, without what every rank stores itself.

    Args:
        rule: whose state it is.
        options: of the parameter group.
        shape: of the matrix, as rules read it.
    """
    specs = rule.state(options, shape).values()
    return sum(int(torch.Size(s.shape).numel()) for s in specs if s.where != "all")


def load(parts: Iterable[MatrixStatePart], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load parts of quantities from whole ones.

    Args:
        parts: of this rank, which are written.
        saved: {matrix: {quantity: whole tensor}}.

    Raises:
        ValueError: a matrix or quantity that is missing, or of another shape.
    """
    for part in parts:
        whole = check(part, saved)
        for dim, (offset, length) in enumerate(zip(part.offsets, part.values.shape, strict=True)):
            whole = whole.narrow(dim, offset, length)
        part.values.copy_(whole)


def check(part: MatrixStatePart, saved: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Return the saved whole quantity for a part, checked.

    Args:
        part: that is to be loaded.
        saved: {matrix: {quantity: whole tensor}}.

    Raises:
        ValueError: the quantity is missing, of another shape, no tensor or not finite.
    """
    whole = saved.get(part.matrix, {}).get(part.name)
    if whole is not None and not isinstance(whole, Tensor):
        raise ValueError(f"{part.matrix}: its {part.name} is {whole!r:.60}, and no tensor")
    check_saved(part, None if whole is None else tuple(whole.shape))
    assert whole is not None
    if not bool(whole.isfinite().all()):
        raise ValueError(f"{part.matrix}: its {part.name} is NaN or infinite in the checkpoint")
    return whole


def check_saved(part: MatrixStatePart, shape: tuple[int, ...] | None) -> None:
    """Check the shape of a quantity in a checkpoint.

    Args:
        part: that is to be loaded.
        shape: of the saved quantity; None if there is none.

    Raises:
        ValueError: names the matrix, and what must have been changed.
    """
    if shape is None:
        raise ValueError(
            f"the checkpoint has no {part.name} of {part.matrix}: it was saved with another"
            " optimizer, or with another rank of this one"
        )
    check_shape(part.matrix, part.name, part.shape, shape)


def check_shape(matrix: str, quantity: str, here: tuple[int, ...], saved: tuple[int, ...]) -> None:
    """Raise a ValueError if a saved quantity of a matrix has another shape than here."""
    if saved != here:
        raise ValueError(
            f"{matrix}: its {quantity} is {here} here, but {saved} in the checkpoint;"
            " write the rank that it was saved with"
        )
