"""Where AutoTP keeps parameters: tiles of matrices, stored as the ZeRO stage stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from spectral_dist.integrations.deepspeed import _compat, _compat_tiles
from spectral_dist.integrations.deepspeed.placement import ZeroPlacement, in_sub_group, offset_in
from spectral_dist.integrations.deepspeed.tensor_parallel import grid_of, numels_of, pieces_of
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, check_contiguous
from spectral_dist.placement.tiles import (
    FlatRange,
    flat_cuts,
    sharing,
    tiles_of,
    whole_cuts,
    whole_piece,
)
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.layout import Layout, Located


@dataclass(frozen=True)
class Spot:
    """Where this rank stores its tile of a parameter, or its copy.

    Attributes:
        route: of the parameter.
        tensor: the index of the local tensor.
        base: the element of that tensor at which what it stores of the parameter begins.
        flat: of every tensor-parallel rank, which run of its tile each data-parallel rank stores;
            empty: all of it.
    """

    route: ParamSpec
    tensor: int
    base: int = 0
    flat: tuple[FlatRange, ...] = ()


class TiledPlacement(ZeroPlacement):
    """The placement of parameters that AutoTP has cut, under every ZeRO stage.

    Tensor-parallel ranks cut matrices into tiles. Data-parallel ranks hold copies of a tile at
    stage 0, and flat ranges of it at the others. A matrix that AutoTP has left whole has a copy on
    each tensor-parallel rank.

    Args:
        engine: the DeepSpeedEngine, which may still be being built.
    """

    knows_blocks = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.grid = grid_of(engine)

    def world_groups(self) -> list[Group]:
        """Return the tensor- and data-parallel ranks."""
        return [self.grid.joint_group]

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Raise for plain tiles that are not contiguous, and flat tensors of whole ones and tiles.

        Raises:
            ValueError: names the parameters.
        """
        if self.engine.zero_optimization_stage() == 0:
            for route, tensor in zip(routes, tensors, strict=True):
                check_contiguous(route, tensor)
            return
        cut, whole = self._by_tiling([route for route in routes if route.matrices])
        if cut and whole:
            raise ValueError(
                f"a parameter group has {cut[0].name}, which AutoTP has cut, and {whole[0].name},"
                " which it has not, and ZeRO lays both into one tensor; give those that it has not"
                " cut a group of their own, or name the optimizer's type in the JSON"
            )

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return a ``Located`` of tiled parameters, and one of matrices that are not cut.

        Parameters that are no matrices count as tiled, since AdamW steps them where they lie.
        """
        spots = self._spots(routes, tensors)
        cut, whole = self._by_tiling([spot.route for spot in spots])
        if group["kind"] != "matrix":
            cut, whole = [spot.route for spot in spots], []
        names = {route.name for route in cut}
        return [
            self._locate([s for s in spots if (s.route.name in names) == tiled], tiled)
            for tiled, subset in ((True, cut), (False, whole))
            if subset
        ]

    def _by_tiling(self, routes: Sequence[ParamSpec]) -> tuple[list[ParamSpec], list[ParamSpec]]:
        """Return (the routes of matrices that AutoTP has cut, the others)."""
        cut: list[ParamSpec] = []
        whole: list[ParamSpec] = []
        for route in routes:
            is_cut = route.matrices and pieces_of(route, self.grid.tensor_size) is not None
            (cut if is_cut else whole).append(route)
        return cut, whole

    def _spots(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> list[Spot]:
        """Return where this rank stores what it has of the parameters; a collective call."""
        ends = _compat.sub_group_ends(self.engine, tensors[0])
        if ends is None and self.engine.zero_optimization_stage() == 0:
            return [Spot(route, index) for index, route in enumerate(routes)]
        own: list[tuple[int, int]] = []
        bases: list[int] = []
        rank, size, flat = self.grid.data_rank, self.grid.data_size, tensors[0]
        if ends is not None:
            routes, begin = in_sub_group(routes, ends), 0
            for route in routes:
                _, run, _ = _compat.partition_of(route.parameter)
                bases.append(begin)
                own.append((0, run))
                begin += run
        else:
            for route in routes:
                offset = offset_in(flat, size, route)
                bases.append(max(0, offset - rank * flat.numel()))
                own.append((offset, flat.numel()))
        texts = collectives.gather_texts(json.dumps(own), self.grid.tensor_group)
        by_rank = zip(*map(json.loads, texts), strict=True)
        return [
            Spot(route, 0, base, tuple(FlatRange(*each) for each in ranges))
            for route, base, ranges in zip(routes, bases, by_rank, strict=True)
        ]

    def _locate(self, spots: Sequence[Spot], tiled: bool) -> Located:
        """Locate parameters that are all tiled, or all the same on every tensor-parallel rank."""
        grid, is_flat = self.grid, bool(spots[0].flat)
        layouts: list[Layout] = []
        spans: list[tuple[str, int, int, int]] = []
        for number, spot in enumerate(spots):
            index = 0 if is_flat else number
            if spot.route.matrices:
                layouts += self._layouts(spot, index, tiled)
            numel = _compat_tiles.numel_of(spot.route.parameter)
            if is_flat:
                mine = spot.flat[grid.tensor_rank]
                edge = grid.data_rank * mine.shard_numel - mine.start
                numel = max(0, min(numel, edge + mine.shard_numel) - max(0, edge))
            spans.append((spot.route.name, index, spot.base, numel))
        group, replicas, replicate_momentum = sharing(
            tiled, is_flat, grid.tensor_group, grid.data_group, lambda: grid.joint_group, True
        )
        device = torch.device(get_accelerator().current_device_name())
        indices = (0,) if is_flat else tuple(spot.tensor for spot in spots)
        return Located(
            tuple(layouts), group, device, tuple(spans), replicas, replicate_momentum, indices
        )

    def _layouts(self, spot: Spot, index: int, tiled: bool) -> list[Layout]:
        """Return the layouts of a parameter's matrices.

        Raises:
            ValueError: a copy lies elsewhere on another tensor-parallel rank.
        """
        route, ranks = spot.route, self.grid.tensor_size
        numel = _compat_tiles.numel_of(route.parameter)
        numels = numels_of(route, ranks) if tiled else [numel]
        if not spot.flat:
            cuts = whole_cuts(numels)
        elif tiled:
            joint = self.grid.joint_ranks
            cuts = [
                cut
                for t, flat in enumerate(spot.flat)
                for cut in flat_cuts(numels[t], flat, [joint[t]])
            ]
        else:
            if len(set(spot.flat)) > 1:
                raise ValueError(
                    f"{route.name} is whole on every tensor-parallel rank, but lies elsewhere in"
                    " each, as AutoTP has cut other matrices unevenly; write a"
                    " tensor_parallel.autotp_size that divides the number of heads, or leave"
                    f' it to AdamW: scalars=["{route.name}"]'
                )
            cuts = flat_cuts(numel, spot.flat[0], [range(self.grid.data_size)])
        pieces = pieces_of(route, ranks) if tiled else None
        if pieces is None:
            pieces = whole_piece(numel, route.matrices[0].width)
        return [
            Layout(m, tuple(tiles_of(m, pieces, cuts, index, spot.base))) for m in route.matrices
        ]


def placement_for(engine: Any) -> ZeroPlacement:
    """Return the placement of an engine's parameters."""
    return TiledPlacement(engine) if engine.autotp_size() > 1 else ZeroPlacement(engine)
