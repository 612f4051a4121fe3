"""State made whole out of what ranks store of it, and cut again: for state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from spectral_dist.core.matrix_state import MatrixStatePart
from spectral_dist.core.units import MatrixUnit
from spectral_dist.params.spec import ParamSpec
from spectral_dist.rules.base import StateSpec
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter

PREFIX = "matrix_"
"""With what the names of matrix state begin among the states of a parameter."""

BUCKET_BYTES = 2**28
"""The most bytes that are summed over ranks in one call; a single quantity may have more."""

Quantity: TypeAlias = tuple[int, str, StateSpec]
"""The place of a matrix in its unit, the quantity's name and its spec."""


def state_name(route: ParamSpec, place: int, quantity: str) -> str:
    """Return the name, among the states of a parameter, of a quantity of one of its matrices.

    Args:
        route: the parameter's spec.
        place: of the matrix in ``route.matrices``.
        quantity: its name.
    """
    return f"{PREFIX}{quantity}" + (f"_{place}" if len(route.matrices) > 1 else "")


def without_matrices(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's states without what belongs to its matrices."""
    return {name: value for name, value in states.items() if not name.startswith(PREFIX)}


def matrix_state(
    unit: MatrixUnit, specs: Sequence[Mapping[str, StateSpec]], meter: Meter
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (place of a matrix in the unit, quantity, whole tensor); a collective call if spread.

    What is yielded is a view, which the next one may overwrite or which is the state itself.

    Args:
        unit: whose matrix state it is.
        specs: of the quantities of each matrix of the unit.
        meter: counts the bytes.
    """
    assert unit.state is not None
    places = {name: place for place, name in enumerate(unit.names)}
    if not unit.state_is_spread:
        for part in unit.state.parts():
            yield places[part.matrix], part.name, part.values
        return
    stored = {
        (places[part.matrix], part.name): part for part in unit.state.parts() if part.is_primary
    }
    for dtype, quantities in _buckets(unit, specs):
        yield from _summed(unit, dtype, quantities, stored, meter)


def _buckets(
    unit: MatrixUnit, specs: Sequence[Mapping[str, StateSpec]]
) -> Iterator[tuple[torch.dtype, list[Quantity]]]:
    """Yield the unit's quantities, as many of one dtype as are summed in one call."""
    by_dtype: dict[torch.dtype, list[Quantity]] = {}
    for place, quantities in enumerate(specs):
        for name, spec in quantities.items():
            dtype = spec.dtype or unit.exchange.state_dtype
            by_dtype.setdefault(dtype, []).append((place, name, spec))
    for dtype, each in by_dtype.items():
        bucket: list[Quantity] = []
        numel = 0
        for quantity in each:
            size = torch.Size(quantity[2].shape).numel()
            if bucket and (numel + size) * dtype.itemsize > BUCKET_BYTES:
                yield dtype, bucket
                bucket, numel = [], 0
            bucket.append(quantity)
            numel += size
        if bucket:
            yield dtype, bucket


def _summed(
    unit: MatrixUnit,
    dtype: torch.dtype,
    quantities: Sequence[Quantity],
    stored: Mapping[tuple[int, str], MatrixStatePart],
    meter: Meter,
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (place, quantity, whole tensor), summed over ranks, each of which adds what it saves.

    Every element is saved by one rank alone, so the sum is exact.
    """
    sizes = [torch.Size(spec.shape).numel() for _, _, spec in quantities]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=unit.located.device)
    whole = [
        values.view(spec.shape)
        for values, (_, _, spec) in zip(torch.split(flat, sizes), quantities, strict=True)
    ]
    for (place, name, _), values in zip(quantities, whole, strict=True):
        part = stored.get((place, name))
        if part is not None:
            _narrow(values, part).copy_(part.values)
    for group in (unit.located.group, unit.located.replicas):
        collectives.sum_ranks(flat, group, meter)
    for (place, name, _), values in zip(quantities, whole, strict=True):
        yield place, name, values


def _narrow(whole: Tensor, part: MatrixStatePart) -> Tensor:
    """Return the view of a whole quantity that a part is of it."""
    for dim, (offset, length) in enumerate(zip(part.offsets, part.values.shape, strict=True)):
        whole = whole.narrow(dim, offset, length)
    return whole


def load(part: MatrixStatePart, whole: Tensor) -> None:
    """Copy into a part what it is of a whole quantity."""
    part.values.copy_(_narrow(whole, part))


def fill_momentum(
    unit: MatrixUnit, index: int, local: Tensor, packed: Tensor, meter: Meter
) -> None:
    """Fill a parameter's local momentum out of its owners' runs; a collective call of replicas.

    Args:
        unit: that has the parameter, whose momentum only owners store.
        index: of the parameter in the unit.
        local: zeros of the parameter's local shape, to be filled.
        packed: this rank's runs.
        meter: counts the bytes.
    """
    flat = local.view(-1)
    for piece, values in unit.momentum_runs.packed_views(index, packed).items():
        piece.view(flat).copy_(values)
    collectives.sum_ranks(flat, unit.located.replicas, meter)
