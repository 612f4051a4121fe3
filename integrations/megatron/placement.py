"""Where Megatron keeps parameters: in tensor-parallel tiles, stored whole or in flat ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectral_dist.integrations.megatron._compat import cut_dimension
from spectral_dist.integrations.megatron.ranks import MegatronRanks
from spectral_dist.integrations.megatron.reader import MegatronReader
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Cut, Layout, Located, Tile
from spectral_dist.sharding.matrix import Matrix


@dataclass(frozen=True)
class FlatRange:
    """Where a parameter lies in a bucket of which data-parallel ranks store equal runs.

    Attributes:
        start: the index in the bucket of the parameter's first element.
        shard_numel: the number of elements of the bucket that each rank stores.
    """

    start: int
    shard_numel: int

    def bounds(self, numel: int) -> tuple[int, list[int]]:
        """Return (the first rank that stores some of the parameter, bounds of runs from it on).

        Args:
            numel: the parameter's number of elements. Bounds are indices into these, ascending.
        """
        stop = self.start + numel
        first, last = self.start // self.shard_numel, -(-stop // self.shard_numel)
        edges = [rank * self.shard_numel - self.start for rank in range(first, last + 1)]
        return first, [min(max(edge, 0), numel) for edge in edges]


class MegatronPlacement(ReplicatedPlacement):
    """The placement of parameters that Megatron's tensor and data parallelism have cut.

    - Without the distributed optimizer a rank stores its whole tile of a matrix, and so do its
      data-parallel peers: tensor-parallel ranks cut the matrix, data-parallel ranks hold copies.
    - With it a rank stores a flat range of its tile, or nothing: both kinds of ranks cut.
    - A matrix that tensor parallelism does not cut (a router's, say) has a copy on each
      tensor-parallel rank.

    Args:
        reader: knows how weights are cut, and over which ranks.
        param_index: (index of the group, index in the group) of every model parameter that this
            rank's optimizer has a tensor of, by its id.
        ranges: the range of every model parameter, by its id, with the distributed optimizer;
            without it None.
        replicate_momentum: whether every rank that has a copy of a tile keeps its momentum.
    """

    may_lack_params = True
    saves_matrix_state = True
    knows_blocks = True

    def __init__(
        self,
        reader: MegatronReader,
        param_index: dict[int, tuple[int, int]],
        ranges: dict[int, FlatRange] | None,
        replicate_momentum: bool,
    ) -> None:
        super().__init__(None, replicate_momentum)
        self.reader, self.param_index, self.ranges = reader, param_index, ranges
        self._ranks: MegatronRanks | None = None

    def prepare(
        self, optimizer: torch.optim.Optimizer, routes: Sequence[ParamSpec], meter: Meter
    ) -> None:
        """Find the ranks that hold this optimizer's parameters.

        They are the same for all: Megatron gives experts an optimizer of their own.
        """
        if routes:
            self._ranks = self.reader.ranks_of(routes[0].parameter)

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Do nothing: Megatron's buffers are contiguous."""

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return a ``Located`` of tiled parameters, and one of matrices that no tensor rank cuts.

        Parameters that are no matrices count as tiled, since AdamW steps them where they lie.
        """
        ranks = self.reader.ranks_of(routes[0].parameter)
        cut: list[ParamSpec] = []
        copied: list[ParamSpec] = []
        for route in routes:
            tiled = cut_dimension(route.parameter) is not None and ranks.tensor_size > 1
            (cut if tiled or group["kind"] != "matrix" else copied).append(route)
        return [self._locate(subset, ranks, subset is cut) for subset in (cut, copied) if subset]

    def _locate(self, routes: Sequence[ParamSpec], ranks: MegatronRanks, tiled: bool) -> Located:
        """Locate parameters that are all tiled, or all the same on every tensor-parallel rank."""
        layouts: list[Layout] = []
        spans: list[tuple[str, int, int, int]] = []
        indices: list[int] = []
        for route in routes:
            parameter = route.parameter
            cuts = self._cuts(parameter, ranks, tiled)
            numel = parameter.numel()
            if id(parameter) in self.param_index:
                indices.append(self.param_index[id(parameter)][1])
                if self.ranges is not None:
                    begin, end = (
                        cuts[ranks.tensor_rank].run(ranks.joint_rank)
                        if tiled
                        else cuts[0].run(ranks.data_rank)
                    )
                    numel = end - begin
                spans.append((route.name, len(indices) - 1, 0, numel))
            layouts += [
                Layout(m, tuple(self._tiles(m, route, cuts, max(0, len(indices) - 1))))
                for m in route.matrices
            ]
        group, replicas, replicate_momentum = self._groups(ranks, tiled)
        device = routes[0].parameter.device
        return Located(
            tuple(layouts),
            group,
            device,
            tuple(spans),
            replicas,
            replicate_momentum,
            tuple(indices),
        )

    def _groups(self, ranks: MegatronRanks, tiled: bool) -> tuple[Group, Group, bool]:
        """Return (ranks that cut, ranks that hold copies, whether every copy has its momentum)."""
        if self.ranges is None:
            if tiled:
                return ranks.tensor_group, ranks.data_group, self.replicate_momentum
            return None, ranks.joint_group, self.replicate_momentum
        if tiled:
            return ranks.joint_group, None, True
        return ranks.data_group, ranks.tensor_group, True

    def _cuts(self, parameter: nn.Parameter, ranks: MegatronRanks, tiled: bool) -> list[Cut]:
        """Return, by tensor-parallel rank, how the elements of the rank's tile are stored.

        Bounds are the same for every tensor-parallel rank, since all of them build the same
        buffers. If they ever do not, their plans differ, which is an error.
        """
        numel = parameter.numel()
        tensor = range(ranks.tensor_size if tiled else 1)
        if self.ranges is None:
            return [Cut((0, numel), (t,) if tiled else None) for t in tensor]
        first, bounds = self.ranges[id(parameter)].bounds(numel)
        data = range(first, first + len(bounds) - 1)
        if not tiled:
            return [Cut(tuple(bounds), tuple(data))]
        return [Cut(tuple(bounds), tuple(ranks.joint_ranks[t][d] for d in data)) for t in tensor]

    def _tiles(
        self, matrix: Matrix, route: ParamSpec, cuts: Sequence[Cut], tensor: int
    ) -> Iterator[Tile]:
        """Yield the tiles of a matrix, from top to bottom.

        Args:
            matrix: one of the parameter's.
            route: the parameter's.
            cuts: how each tensor-parallel rank's elements are stored.
            tensor: the index of the local tensor that this rank's elements are in.

        Raises:
            ValueError: columns are cut in several parts, which is not supported.
        """
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
        return [] if self._ranks is None else [self._ranks.joint_group]


def _segments(rows: int, ranks: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Return (rank, first row, rows, first row in the rank's tensor) of each piece of a weight.

    The rows are ``stride`` equal parts, each of which is cut over the ranks. A rank's tensor holds
    its piece of the first part, then that of the second, and so on. Pieces are in order of their
    first rows.

    Args:
        rows: of the whole weight.
        ranks: the number of tensor-parallel ranks.
        stride: the number of parts.
    """
    part, piece = rows // stride, rows // stride // ranks
    return [
        (rank, index * part + rank * piece, piece, index * piece)
        for index in range(stride)
        for rank in range(ranks)
    ]
