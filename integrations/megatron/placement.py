"""Where Megatron keeps parameters: in tensor-parallel tiles, stored whole or in flat ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectral_dist.integrations.megatron._compat import cut_dimension
from spectral_dist.integrations.megatron.ranks import MegatronRanks
from spectral_dist.integrations.megatron.reader import MegatronReader
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement
from spectral_dist.placement.tiles import (
    FlatRange,
    TilePiece,
    even_pieces,
    flat_cuts,
    sharing,
    tiles_of,
    whole_cuts,
    whole_piece,
)
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Cut, Layout, Located


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
            index, pieces = max(0, len(indices) - 1), self._pieces(route, len(cuts))
            layouts += [Layout(m, tuple(tiles_of(m, pieces, cuts, index))) for m in route.matrices]
        group, replicas, replicate_momentum = sharing(
            tiled, self.ranges is not None, ranks.tensor_group, ranks.data_group,
            lambda: ranks.joint_group, self.replicate_momentum,
        )  # fmt: skip
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

    def _pieces(self, route: ParamSpec, tensor: int) -> list[TilePiece]:
        """Return the pieces into which ``tensor`` tensor-parallel ranks cut a parameter."""
        dim = cut_dimension(route.parameter)
        if not route.matrices or tensor == 1 or dim is None:
            return whole_piece(route.parameter.numel(), route.shape[-1])
        stride = self.reader.stride(route.parameter)
        return even_pieces(route.name, route.shape, dim, stride, tensor)

    def _cuts(self, parameter: nn.Parameter, ranks: MegatronRanks, tiled: bool) -> list[Cut]:
        """Return, by tensor-parallel rank, how the elements of the rank's tile are stored.

        Bounds are the same for every tensor-parallel rank, since all of them build the same
        buffers. If they ever do not, their plans differ, which is an error.
        """
        numel = parameter.numel()
        if self.ranges is None:
            return whole_cuts([numel] * (ranks.tensor_size if tiled else 1))
        of_data: Sequence[Sequence[int]] = [range(ranks.data_size)]
        joint = ranks.joint_ranks if tiled else of_data
        return flat_cuts(numel, self.ranges[id(parameter)], joint)

    def world_groups(self) -> list[Group]:
        """Return the tensor- and data-parallel ranks of this optimizer's parameters."""
        return [] if self._ranks is None else [self._ranks.joint_group]
