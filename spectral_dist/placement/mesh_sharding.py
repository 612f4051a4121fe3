"""How a device mesh shards one parameter: which dimensions cut it, and what each rank stores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding.layout import StackBox, StackBoxes


@dataclass(frozen=True)
class MeshSharding:
    """Which dimensions of the model's mesh shard a parameter, and which replicate it.

    Attributes:
        sharded: (mesh dimension, tensor dimension) of each cut, in the order in which they were
            made.
        replicated: the other dimensions of the parameter's own mesh that have more than one rank.
        unmentioned: dimensions of more than one rank that only other parameters' meshes have; the
            parameter has copies along them if its values are equal there.
    """

    sharded: tuple[tuple[int, int], ...]
    replicated: tuple[int, ...]
    unmentioned: tuple[int, ...]


def nontrivial(mesh: DeviceMesh, dims: Iterable[int]) -> tuple[int, ...]:
    """Return those of some mesh dimensions that have more than one rank, ascending."""
    return tuple(dim for dim in sorted(dims) if mesh.size(dim) > 1)


def sharded_dims(name: str, tensor: DTensor) -> tuple[tuple[int, int], ...]:
    """Return (mesh dimension, tensor dimension) of each cut, in the order in which cuts were made.

    Args:
        name: of the parameter, for errors.
        tensor: the parameter.

    Raises:
        ValueError: a placement, or an order of them, that is not supported.
    """
    cuts: list[tuple[int, int, int]] = []  # (mesh dimension, tensor dimension, split factor)
    for dim, placement in enumerate(tensor.placements):
        if tensor.device_mesh.size(dim) == 1 or placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if placement.is_partial() or axis is None:
            raise ValueError(
                f"{name} is {placement} on mesh dimension {dim}; shard or replicate it"
            )
        # FSDP over TP: a strided cut was made after those of the mesh dimensions to its right
        factor = int(getattr(placement, "split_factor", 0))
        strided = sum(1 for _, _, f in cuts if f)
        cuts.insert(len(cuts) - (0 if factor else strided), (dim, axis % tensor.ndim, factor))
    for i, (dim, axis, factor) in enumerate(cuts):
        before = math.prod(tensor.device_mesh.size(d) for d, a, _ in cuts[:i] if a == axis)
        if factor and factor != before:
            raise ValueError(
                f"{name}: {tensor.placements} on mesh dimension {dim} splits by {factor} where"
                f" {before} is expected; this order of shardings is not supported"
            )
    return tuple((dim, axis) for dim, axis, _ in cuts)


def stored_stack_boxes(
    route: ParamSpec,
    sizes: tuple[tuple[int, int], ...],
    sharded: tuple[tuple[int, int], ...],
) -> StackBoxes:
    """Return the box of a parameter that each rank stores, in the order of their coordinates.

    Args:
        route: the parameter's spec.
        sizes: (mesh dimension, number of ranks) of the dimensions along which the ranks differ.
        sharded: (mesh dimension, tensor dimension) of each cut, in order.

    Raises:
        ValueError: a cut of a dimension behind the second, of no stack.
    """
    shape = route.shape
    if not route.stacked and any(axis > 1 for _, axis in sharded):
        raise ValueError(
            f"{route.name}, {shape}, is cut beyond its second dimension; cut its first"
        )
    return _boxes_by_rank(tuple(shape), route.stacked, sizes, sharded)


@lru_cache(maxsize=1024)
def _boxes_by_rank(
    shape: tuple[int, ...],
    stacked: bool,
    sizes: tuple[tuple[int, int], ...],
    sharded: tuple[tuple[int, int], ...],
) -> StackBoxes:
    """Return ``stored_stack_boxes``, cached for all parameters of one shape that are cut alike.

    Args:
        shape: of the parameter.
        stacked: whether its first dimension counts matrices.
        sizes: (mesh dimension, number of ranks) of the dimensions along which the ranks differ.
        sharded: (mesh dimension, tensor dimension) of each cut, in order.
    """
    boxes, ranks_along = [], dict(sizes)
    for coordinates in product(*(range(size) for _, size in sizes)):
        coordinate_of = dict(zip(ranks_along, coordinates, strict=True))
        ranges = [(0, size) for size in shape]
        for dim, axis in sharded:
            begin, end = ranges[axis]
            chunk = -(-(end - begin) // ranks_along[dim])  # as torch.chunk cuts
            first = min(end, begin + coordinate_of[dim] * chunk)
            ranges[axis] = first, min(end, first + chunk)
        boxes.append(_as_stack(ranges, stacked, math.prod(shape[2:])))
    return StackBoxes(boxes)


def _as_stack(ranges: list[tuple[int, int]], stacked: bool, rest: int) -> StackBox:
    """Return a box of a parameter as one of (stack, rows, columns).

    Args:
        ranges: [begin, end) of each of the parameter's dimensions.
        stacked: whether its first dimension counts matrices.
        rest: the elements of the dimensions behind the second, which are a convolution's kernel.
    """
    if stacked:
        return ranges[0], ranges[1], ranges[2]
    if len(ranges) == 1:
        return (0, 1), ranges[0], (0, 1)
    return (0, 1), ranges[0], (ranges[1][0] * rest, ranges[1][1] * rest)
