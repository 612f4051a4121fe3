"""What a rule keeps of whole matrices, at their owners or in slabs: a stacked tensor per batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_dist.rules.rule import Kept, Rule
from spectral_dist.sharding.exchange import Exchange
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.layout import Layout


@dataclass(frozen=True)
class Part:
    """What this rank has of one quantity of one matrix.

    ``offsets``: of ``values`` in the whole, of shape ``shape``. ``speaks``: whether no other rank
    has the same part, or this one is to save it.
    """

    matrix: str
    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor
    speaks: bool


class MatrixState:
    """Of the matrices that this rank computes in one exchange, all zeros at first."""

    def __init__(
        self,
        rule: Rule,
        group: dict[str, Any],
        layouts: Sequence[Layout],
        exchange: Exchange,
    ) -> None:
        self.layouts = layouts
        self._kept: dict[tuple[int, ...], dict[str, Kept]] = {}
        self._tensors: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._reductions: dict[tuple[int, ...], Reduction | None] = {}
        for which, reduction in exchange.batches():
            kept = rule.keeps(group, layouts[which[0]].matrix.shape)
            self._kept[which], self._reductions[which] = kept, reduction
            self._tensors[which] = {
                name: torch.zeros(
                    _stacked(quantity, len(which), reduction),
                    dtype=quantity.dtype or exchange.home_dtype,
                    # what the host asks for in every step must not wait for the device
                    device="cpu" if quantity.dtype == torch.int64 else exchange.device,
                )
                for name, quantity in kept.items()
            }

    def of(self, which: Sequence[int]) -> Mapping[str, Tensor]:
        """Of one batch, stacked."""
        return self._tensors[tuple(which)]

    def saved(
        self, which: Sequence[int], mine: Sequence[int], some: Sequence[int]
    ) -> list[tuple[Tensor, list[int], Tensor]]:
        """(tensor, rows, copies of them) of some of a batch; ``mine``: those owned here."""
        places = {k: place for place, k in enumerate(mine)}
        found = []
        for name, tensor in self.of(which).items():
            at_owner = self._kept[tuple(which)][name].where == "owner"
            rows = [places[k] for k in some if k in places] if at_owner else list(some)
            found.append((tensor, rows, tensor[rows]))
        return found

    def parts(self) -> Iterator[Part]:
        """Matrix by matrix, views of the state itself."""
        for which, tensors in self._tensors.items():
            reduction = self._reductions[which]
            mine = list(range(len(which))) if reduction is None else reduction.mine
            for k, i in enumerate(which):
                for name, kept in self._kept[which].items():
                    offsets, place = (0,) * len(kept.shape), k
                    if kept.where == "slab" and reduction is not None:
                        offsets = (reduction.begin, *offsets[1:])
                    if kept.where == "owner":
                        if k not in mine:
                            continue
                        place = mine.index(k)
                    values = tensors[name][place]
                    speaks = kept.where != "all" or k in mine
                    matrix = self.layouts[i].matrix.name
                    if values.numel():
                        yield Part(matrix, name, kept.shape, offsets, values, speaks)


def _stacked(kept: Kept, count: int, reduction: Reduction | None) -> tuple[int, ...]:
    """The shape of a batch's quantity on this rank."""
    if reduction is None or kept.where == "all":
        return (count, *kept.shape)
    if kept.where == "owner":
        return (len(reduction.mine), *kept.shape)
    return (count, reduction.length, *kept.shape[1:])


def elements(rule: Rule, group: dict[str, Any], shape: tuple[int, int]) -> int:
    """Numbers that the rule keeps of a matrix of this shape, the few of each rank left out."""
    kept = rule.keeps(group, shape).values()
    return sum(int(torch.Size(k.shape).numel()) for k in kept if k.where != "all")


def load(parts: Iterable[Part], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy whole quantities into the parts that are here.

    Raises:
        ValueError: a matrix or quantity that is missing, or of another shape.
    """
    for part in parts:
        whole = saved.get(part.matrix, {}).get(part.name)
        check_saved(part, None if whole is None else tuple(whole.shape))
        assert whole is not None
        for dim, (offset, length) in enumerate(zip(part.offsets, part.values.shape, strict=True)):
            whole = whole.narrow(dim, offset, length)
        part.values.copy_(whole)


def check_saved(part: Part, shape: tuple[int, ...] | None) -> None:
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
