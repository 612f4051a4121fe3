"""Tensors of which each rank stores some boxes, in the form of torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from spectral_dist.core.units import MatrixUnit
from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding import collectives
from spectral_dist.sharding.bucket_routes import tile_pieces
from spectral_dist.sharding.layout import Tile
from spectral_dist.sharding.matrix import Matrix

aten = torch.ops.aten
COPIES = {
    *(aten.clone.default, aten.detach.default, aten._to_copy.default, aten.empty_like.default),
    *(aten.alias.default, aten.lift_fresh.default),
}
"""Operations that are applied to each of a tensor's parts."""
Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in the whole parameter."""


class ChunkedTensor(torch.Tensor):
    """A tensor of which this rank stores some boxes, which torch.distributed.checkpoint saves.

    The double-underscore methods are the protocol by which it asks a tensor for its chunks.

    Attributes:
        parts: the values of each box on this rank, by the box's offsets in the whole tensor. Boxes
            must not overlap, on this or on other ranks.
    """

    parts: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], like: Tensor, parts: Sequence[tuple[Chunk, Tensor]]
    ) -> ChunkedTensor:
        """Make a tensor of boxes.

        Args:
            shape: of the whole tensor.
            like: a tensor of its dtype and device.
            parts: ((offsets, sizes) in the whole tensor, values of that many elements) of each box.
        """
        self: ChunkedTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        self.parts = {torch.Size(offsets): values.view(sizes) for (offsets, sizes), values in parts}
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        """Return the shape and the boxes of this rank."""
        return f"ChunkedTensor(of {tuple(self.shape)}, here {self.__create_chunk_list__()})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation that copies the tensor, to its device or to the host; refuse any other.

        A save in the background copies what it writes first.

        Raises:
            NotImplementedError: another operation.
        """
        kwargs = kwargs or {}
        if func is aten.copy_.default and all(isinstance(each, cls) for each in args[:2]):
            target, source = args[:2]
            for offsets, values in target.parts.items():
                values.copy_(source.parts[offsets])
            return target
        if func is aten.new_empty.default and list(args[1]) == list(args[0].shape):
            func, args = aten.empty_like.default, args[:1]
        if func not in COPIES:
            raise NotImplementedError(
                f"{func} of what is spread over ranks, and only to be saved; write"
                " spectral_dist.checkpoint.async_save, or dcp.async_save without a storage_writer"
            )
        source = args[0]
        kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
        parts = {o: func(values, *args[1:], **kwargs) for o, values in source.parts.items()}
        like = func(torch.empty(0, dtype=source.dtype, device=source.device), *args[1:], **kwargs)
        return cls(source.shape, like, [((o, v.shape), v) for o, v in parts.items()])

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(o, values.shape) for o, values in self.parts.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.parts[index.offset]


def momentum_runs(
    unit: MatrixUnit, index: int, route: ParamSpec, momentum: Tensor
) -> ChunkedTensor:
    """Return the momentum that this rank stores of a parameter, as boxes of the parameter.

    Args:
        unit: that has the parameter.
        index: of the parameter among the unit's tensors.
        route: the parameter's spec.
        momentum: its packed runs on this rank (``MatrixUnit.new_momentum``).
    """
    _check_columns(unit, index, route)
    located = unit.located
    views = unit.momentum_runs.packed_views(index, momentum)
    parts: list[tuple[Chunk, Tensor]] = []
    if located.group is None:
        for piece, view in views.items():
            matrix = located.layouts[piece.matrix].matrix
            row, column = divmod(piece.start, matrix.width)
            rows = piece.length // matrix.width if piece.is_run else piece.rows
            box = (row, column, rows, piece.length // rows)
            parts += _boxes(route, matrix.width, box, piece.step, view)
        return ChunkedTensor(route.shape, momentum, parts)
    rank = collectives.rank(located.group)
    by_place = {(piece.start, piece.length): view for piece, view in views.items()}
    for layout in located.layouts:
        for tile in layout.tiles:
            for piece in tile_pieces(tile, 0, rank) if tile.tensor == index else ():
                if (piece.start, piece.length) in by_place:
                    box = _box_of_tile(layout.matrix, tile, rank)
                    view = by_place[piece.start, piece.length]
                    parts += _boxes(route, layout.matrix.width, box, tile.step, view)
    return ChunkedTensor(route.shape, momentum, parts)


def _check_columns(unit: MatrixUnit, index: int, route: ParamSpec) -> None:
    """Raise a ValueError if ranks share columns of a parameter of more than two dimensions.

    Every rank raises it, also one that has none of them: the plan tells.

    Args:
        unit: that has the parameter.
        index: of the parameter among the unit's tensors.
        route: the parameter's spec.
    """
    if len(route.shape) == 2 or route.stacked or unit.located.group is not None:
        return
    for layout, strategy in zip(unit.located.layouts, unit.plan.strategies, strict=True):
        rows, columns = layout.matrix.shape
        if layout.tiles[0].tensor == index and strategy == "split" and columns > rows:
            raise ValueError(
                f"{route.name}: ranks share its columns under strategy='split', which no box of"
                f" {route.shape} is; write strategy='owner' to save with"
                " torch.distributed.checkpoint"
            )


def _box_of_tile(matrix: Matrix, tile: Tile, rank: int) -> tuple[int, int, int, int]:
    """Return (row, column, rows, columns) of what a rank stores of a tile, in the parameter.

    The parameter is seen as (rows, columns), and what the rank stores must be whole rows of the
    tile.

    Args:
        matrix: of the tile.
        tile: the tile.
        rank: this rank in the layout's group.
    """
    begin, end = tile.part(rank)
    row = _row_of_parameter(matrix, tile.row) + begin // tile.cols
    column = next(
        first + (tile.col - col) * tile.step
        for col, first, count in matrix.column_runs(0, matrix.width)
        if col <= tile.col < col + count
    )
    return row, column, (end - begin) // tile.cols, tile.cols


def _boxes(
    route: ParamSpec, width: int, box: tuple[int, int, int, int], step: int, values: Tensor
) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield the boxes of a parameter that some of its rows and columns are.

    Args:
        route: the parameter's spec.
        width: the number of columns, of the parameter seen as (rows, columns).
        box: (row, column, rows, columns) in it.
        step: from one column to the next; if it is not 1, each column is a box.
        values: of the rows and columns; of all columns, if the parameter has more than two
            dimensions.
    """
    row, column, rows, columns = box
    number, row = divmod(row, route.stack // width)
    if len(route.shape) > 2 and not route.stacked:
        yield ((row, *(0 for _ in route.shape[1:])), (rows, *route.shape[1:])), values
        return
    prefix, one = ((number,), (1,)) if route.stacked else ((), ())
    if step == 1:
        yield ((*prefix, row, column), (*one, rows, columns)), values
        return
    for k, each in enumerate(values.view(rows, columns).unbind(1)):
        yield ((*prefix, row, column + k * step), (*one, rows, 1)), each


def _row_of_parameter(matrix: Matrix, row: int) -> int:
    """Return the row of the parameter, seen as (rows, columns), at which a row of a matrix is."""
    blocks = iter(matrix.blocks)
    start, rows = next(blocks)
    while row >= rows:
        row -= rows
        start, rows = next(blocks)
    return start // matrix.width + row
