"""Where Megatron keeps parameters: tensor-parallel tiles, whole or in flat ranges of a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectral_dist.integrations.megatron._compat import cut_dimension
from spectral_dist.integrations.megatron.ranks import Ranks
from spectral_dist.integrations.megatron.reader import MegatronReader
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Cut, Layout, Located, Matrix, Tile


@dataclass(frozen=True)
class FlatRange:
    """Where a parameter lies in a bucket that data-parallel ranks share evenly."""

    start: int
    """of the parameter in the bucket"""
    share: int
    """elements of the bucket that each rank stores"""

    def bounds(self, numel: int) -> tuple[int, list[int]]:
        """(first rank that stores some of it, bounds of the ranks' runs from there on)."""
        stop = self.start + numel
        first, last = self.start // self.share, -(-stop // self.share)
        edges = [rank * self.share - self.start for rank in range(first, last + 1)]
        return first, [min(max(edge, 0), numel) for edge in edges]


class MegatronPlacement(ReplicatedPlacement):
    """Tiles of matrices on tensor-parallel ranks, over data-parallel ranks.

    - Without the distributed optimizer a rank stores its whole tile, as its data-parallel peers do:
      tensor-parallel ranks cut, data-parallel ones copy.
    - With it a rank stores a flat range of its tile, or nothing of it: both cut.
    - A matrix that no tensor-parallel rank cuts (a router's, say) has copies on all of them.

    Args:
        reader: knows how weights are cut, and over which ranks.
        home: (group, place in the group on this rank) of every model parameter that has one.
        ranges: of every model parameter, with the distributed optimizer; else None.
    """

    may_lack_params = True
    saves_matrix_state = True
    knows_blocks = True

    def __init__(
        self,
        reader: MegatronReader,
        home: dict[int, tuple[int, int]],
        ranges: dict[int, FlatRange] | None,
        replicate_momentum: bool,
    ) -> None:
        super().__init__(None, replicate_momentum)
        self.reader, self.home, self.ranges = reader, home, ranges
        self._ranks: Ranks | None = None

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Find the ranks; Megatron gives dense parameters and experts optimizers of their own."""
        if routes:
            self._ranks = self.reader.of(routes[0].parameter)

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Do nothing: Megatron's buffers are contiguous."""

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return one for what is cut into tiles, one for what every tensor-parallel rank has."""
        ranks = self.reader.of(routes[0].parameter)
        cut: list[ParamSpec] = []
        copied: list[ParamSpec] = []
        for route in routes:
            tiled = cut_dimension(route.parameter) is not None and ranks.tensor > 1
            (cut if tiled or group["kind"] != "matrix" else copied).append(route)
        return [self._place(alike, ranks, alike is cut) for alike in (cut, copied) if alike]

    def _place(self, routes: Sequence[ParamSpec], ranks: Ranks, tiled: bool) -> Located:
        layouts: list[Layout] = []
        spans: list[tuple[str, int, int, int]] = []
        indices: list[int] = []
        for route in routes:
            parameter = route.parameter
            cuts = self._cuts(parameter, ranks, tiled)
            numel = parameter.numel()
            if id(parameter) in self.home:
                indices.append(self.home[id(parameter)][1])
                if self.ranges is not None:
                    begin, end = (
                        cuts[ranks.tensor_rank].run(ranks.number)
                        if tiled
                        else cuts[0].run(ranks.data_rank)
                    )
                    numel = end - begin
                spans.append((route.name, len(indices) - 1, 0, numel))
            layouts += [
                Layout(m, tuple(self._tiles(m, route, cuts, max(0, len(indices) - 1))))
                for m in route.matrices
            ]
        group, replicas, everywhere = self._groups(ranks, tiled)
        device = routes[0].parameter.device
        return Located(
            tuple(layouts), group, device, tuple(spans), replicas, everywhere, tuple(indices)
        )

    def _groups(self, ranks: Ranks, tiled: bool) -> tuple[Group, Group, bool]:
        """(ranks that cut, ranks that copy, whether every copy keeps momentum)."""
        if self.ranges is None:
            if tiled:
                return ranks.tensor_group, ranks.data_group, self.replicate_momentum
            return None, ranks.both, self.replicate_momentum
        if tiled:
            return ranks.both, None, True
        return ranks.data_group, ranks.tensor_group, True

    def _cuts(self, parameter: nn.Parameter, ranks: Ranks, tiled: bool) -> list[Cut]:
        """How the elements that each tensor-parallel rank has are stored, by its rank.

        The same for all of them: they build the same buffers, and a plan that differs is an error.
        """
        numel = parameter.numel()
        tensor = range(ranks.tensor if tiled else 1)
        if self.ranges is None:
            return [Cut((0, numel), (t,) if tiled else None) for t in tensor]
        first, bounds = self.ranges[id(parameter)].bounds(numel)
        data = range(first, first + len(bounds) - 1)
        if not tiled:
            return [Cut(tuple(bounds), tuple(data))]
        return [Cut(tuple(bounds), tuple(ranks.numbers[t][d] for d in data)) for t in tensor]

    def _tiles(
        self, matrix: Matrix, route: ParamSpec, cuts: Sequence[Cut], tensor: int
    ) -> Iterator[Tile]:
        """The rectangles of a matrix that tensor-parallel ranks have, from top to bottom."""
        dim, width, row = cut_dimension(route.parameter), matrix.shape[1], 0
        stride = self.reader.stride(route.parameter)
        for start, rows in matrix.blocks:
            first = start // width
            if dim == 1 and len(cuts) > 1:
                if stride > 1:
                    raise ValueError(
                        f"{route.name} has columns cut with stride {stride}, which"
                        " is not supported; leave it to AdamW with scalars=[...]"
                    )
                part = width // len(cuts)
                for t, cut in enumerate(cuts):
                    yield Tile(row, t * part, rows, part, cut, first * part, 0, tensor, block=t)
            else:
                for t, begin, size, local in _segments(route.shape[0], len(cuts), stride):
                    top, bottom = max(first, begin), min(first + rows, begin + size)
                    if top < bottom:
                        yield Tile(
                            row + top - first, 0, bottom - top, width, cuts[t],
                            (local + top - begin) * width, 0, tensor, block=t,
                        )  # fmt: skip
            row += rows

    def world_groups(self) -> list[Group]:
        """Return the tensor- and data-parallel ranks of this optimizer's parameters."""
        return [] if self._ranks is None else [self._ranks.both]


def _segments(rows: int, ranks: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(rank, first row, rows, first row in the rank's own) of each piece, from top to bottom.

    Each of ``stride`` equal parts of the rows is cut over the ranks; a rank has its piece of the
    first part, then of the second, ...
    """
    part, piece = rows // stride, rows // stride // ranks
    return [
        (rank, number * part + rank * piece, piece, number * piece)
        for number in range(stride)
        for rank in range(ranks)
    ]
