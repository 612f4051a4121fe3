"""State of whole matrices, at their owners or in slabs: a stacked tensor per batch."""

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
    """What this rank has of one quantity of one matrix.

    Attributes:
        matrix, name: the matrix and the quantity.
        shape: of the whole quantity.
        offsets: of ``values`` in it.
        values: a view of the state itself.
        is_primary: whether no other rank has the same part, or this one is to save it.
    """

    matrix: str
    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor
    is_primary: bool


class MatrixState:
    """The state of the matrices that this rank computes in one exchange, all zeros at first."""

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
                    _stacked(spec, len(which), reduction),
                    dtype=spec.dtype or exchange.state_dtype,
                    # what the host asks for in every step must not wait for the device
                    device="cpu" if spec.dtype == torch.int64 else exchange.device,
                )
                for name, spec in specs.items()
            }

    def of(self, which: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the quantities of one batch, stacked."""
        return self._tensors[tuple(which)]

    def copies(
        self, which: Sequence[int], owned: Sequence[int], wanted: Sequence[int]
    ) -> list[tuple[Tensor, list[int], Tensor]]:
        """Return (tensor, rows, copies of them) of ``wanted`` of a batch; ``owned``: those here."""
        places = {k: place for place, k in enumerate(owned)}
        copied = []
        for name, tensor in self.of(which).items():
            at_owner = self._specs[tuple(which)][name].where == "owner"
            rows = [places[k] for k in wanted if k in places] if at_owner else list(wanted)
            copied.append((tensor, rows, tensor[rows]))
        return copied

    def parts(self) -> Iterator[MatrixStatePart]:
        """Iterate over what is here, matrix by matrix."""
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


def _stacked(spec: StateSpec, count: int, reduction: Reduction | None) -> tuple[int, ...]:
    """Return the shape of a batch's quantity on this rank."""
    if reduction is None:
        return (count, *spec.shape)
    if spec.where == "owner":
        return (len(reduction.owned), *spec.shape)
    shape, dimension = list(spec.shape), spec.cut_dimension(reduction.along)
    if dimension is not None:
        shape[dimension] = reduction.length
    return (count, *shape)


def elements(rule: Rule[Any], options: MatrixOptions, shape: Shape) -> int:
    """Count what a rule keeps of a matrix of this shape, those of every rank left out."""
    specs = rule.state(options, shape).values()
    return sum(int(torch.Size(s.shape).numel()) for s in specs if s.where != "all")


def load(parts: Iterable[MatrixStatePart], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy whole quantities into the parts that are here.

    Raises:
        ValueError: a matrix or quantity that is missing, or of another shape.
    """
    for part in parts:
        whole = check(part, saved)
        for dim, (offset, length) in enumerate(zip(part.offsets, part.values.shape, strict=True)):
            whole = whole.narrow(dim, offset, length)
        part.values.copy_(whole)


def check(part: MatrixStatePart, saved: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Return the whole quantity of which a part is to be loaded.

    Raises:
        ValueError: it is missing, of another shape, no tensor or not finite.
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
    """Raise for what a checkpoint has in place of a part's quantity: its shape, None for nothing.

    Raises:
        ValueError: names the matrix, and what must have been changed.
    """
    if shape is None:
        raise ValueError(
            f"the checkpoint has no {part.name} of {part.matrix}: it was saved with another"
            " optimizer, or with another rank of this one"
        )
    if shape != part.shape:
        raise ValueError(
            f"{part.matrix}: its {part.name} is {part.shape} here, but {shape} in the checkpoint;"
            " write the rank that it was saved with"
        )
