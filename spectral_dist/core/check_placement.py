"""Check that a placement's layouts are true; public in ``spectral_dist.testing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectral_dist.core.first_step import matrix_of
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding import collectives
from spectral_dist.sharding.bucket_routes import tile_pieces
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Located


def check_placement(optimizer: ShardedOptimizer, whole: Mapping[str, Tensor]) -> None:
    """Check that a placement's layouts are true; a collective call.

    The run that a layout has for this rank must hold those elements of the matrix, and all ranks of
    a group together must have each element once.

    Args:
        optimizer: built with the placement, on parameters that have their values.
        whole: the whole parameters by name, equal on all ranks.

    Raises:
        AssertionError: on every rank, if it fails on any; names the matrix.
    """
    optimizer.prepare_placement()
    placement = optimizer.placement
    for group, tensors in placement.param_batches(optimizer):
        routes = {route.name: route for route in optimizer.routes[group["id"]]}
        for unit in optimizer.units(group, tensors):
            located, error, counts = unit.located, None, [0] * len(unit.located.layouts)
            local = [placement.local(tensors[i]).detach().reshape(-1) for i in unit.tensors]
            try:
                _check_spans(located, local, routes)
                counts = _check_tiles(located, local, routes, whole)
            except (AssertionError, LookupError, RuntimeError) as raised:
                error = raised
            _raise_together(error, placement.world_groups())
            _raise_together(_count_problem(located, counts), placement.world_groups())


def _raise_together(error: Exception | None, groups: Sequence[Group]) -> None:
    """Raise an AssertionError on all ranks if there is an error on any."""
    try:
        collectives.raise_together(error, groups)
    except Exception as raised:
        raise AssertionError(str(raised)) from raised


def _check_spans(
    located: Located, local: Sequence[Tensor], routes: Mapping[str, ParamSpec]
) -> None:
    """Raise an AssertionError for a span of no parameter, or of more than its local tensor has."""
    for name, index, start, numel in located.spans:
        if name not in routes:
            raise AssertionError(f"{name} is no parameter of this group")
        if start + numel > local[index].numel():
            raise AssertionError(f"{name} ends beyond its tensor")


def _check_tiles(
    located: Located,
    local: Sequence[Tensor],
    routes: Mapping[str, ParamSpec],
    whole: Mapping[str, Tensor],
) -> list[int]:
    """Return how many elements of each matrix this rank stores, after comparing all of them.

    Args:
        located: where parameters live, by the placement.
        local: their flat local tensors.
        routes: specs of all parameters of the group, by name.
        whole: the whole parameters by name.

    Raises:
        AssertionError: an element is not the one that the layout says; names the matrix.
    """
    rank = collectives.rank(located.group)
    by_matrix = {m.name: r.name for r in routes.values() for m in r.matrices}
    counts = []
    for layout in located.layouts:
        matrix, count = layout.matrix, 0
        values = matrix_of(matrix, whole[by_matrix[matrix.name]])
        values = values.mT if matrix.transposed else values
        for tile in layout.tiles:
            begin, end = tile.part(rank)
            count += end - begin
            box = values[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
            expected = box.reshape(-1)[begin:end]
            pieces = tile_pieces(tile, 0, rank)
            views = [piece.view(local[tile.tensor]).reshape(-1) for piece in pieces]
            stored = torch.cat(views) if views else expected
            if not torch.equal(stored.to(expected), expected):
                raise AssertionError(
                    f"{matrix.name}: what this rank stores is not [{begin}, {end}) of its tile at"
                    f" row {tile.row}, column {tile.col}"
                )
        counts.append(count)
    return counts


def _count_problem(located: Located, counts: Sequence[int]) -> AssertionError | None:
    """Return an error if the ranks of a group do not store every element once; a collective call.

    Args:
        located: where parameters live, by the placement.
        counts: how many elements of each matrix this rank stores.
    """
    totals = torch.tensor(counts, dtype=torch.int64, device=located.device)
    collectives.sum_ranks(totals, located.group, Meter())
    for layout, total in zip(located.layouts, totals.tolist(), strict=True):
        if total != layout.matrix.numel:
            return AssertionError(
                f"{layout.matrix.name}: the ranks of its group hold {total} of"
                f" {layout.matrix.numel} elements"
            )
    return None
