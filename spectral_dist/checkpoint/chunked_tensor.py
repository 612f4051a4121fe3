"""Tensors of which each rank has some boxes, as torch.distributed.checkpoint takes them."""

from __future__ import annotations

from collections.abc import Sequence
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
from spectral_dist.sharding.layout import Layout, Tile

aten = torch.ops.aten
COPIES = {
    *(aten.clone.default, aten.detach.default, aten._to_copy.default, aten.empty_like.default),
    *(aten.alias.default, aten.lift_fresh.default),
}
"""What is done to every part in the same way."""
Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in the whole parameter."""


class Runs(torch.Tensor):
    """Boxes of a tensor, as torch.distributed.checkpoint reads and writes them: its protocol.

    ``parts``: (offsets, sizes) in the whole tensor of shape ``shape``, and the values on this rank,
    of that many elements; no part may overlap another one, here or on another rank.
    """

    parts: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], like: Tensor, parts: Sequence[tuple[Chunk, Tensor]]
    ) -> Runs:
        """Of the dtype and device of ``like``."""
        self: Runs = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        self.parts = {torch.Size(offsets): values.view(sizes) for (offsets, sizes), values in parts}
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        """The boxes that are here."""
        return f"Runs(of {tuple(self.shape)}, here {self.__create_chunk_list__()})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Copy: what is to be saved while training goes on is copied first, here or to the host."""
        kwargs = kwargs or {}
        if func is aten.copy_.default and all(isinstance(each, cls) for each in args[:2]):
            target, source = args[:2]
            for at, values in target.parts.items():
                values.copy_(source.parts[at])
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
        parts = {at: func(values, *args[1:], **kwargs) for at, values in source.parts.items()}
        like = func(torch.empty(0, dtype=source.dtype, device=source.device), *args[1:], **kwargs)
        return cls(source.shape, like, [((at, v.shape), v) for at, v in parts.items()])

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
        return [ChunkStorageMetadata(at, values.shape) for at, values in self.parts.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.parts[index.offset]


def momentum_runs(unit: MatrixUnit, index: int, route: ParamSpec, momentum: Tensor) -> Runs:
    """Return the momentum that this rank keeps of tensor ``index``, run by run."""
    located = unit.located
    rank = collectives.rank(located.group)
    where: dict[tuple[int, int], Chunk] = {}
    for layout in located.layouts:
        for tile in layout.tiles:
            begin, length = tile.run(rank)
            if tile.tensor == index and length:
                where[begin, length] = _chunk(layout, tile, rank, route)
    views = unit.momentum_runs.packed_views(index, momentum)
    parts = [(where[piece.start, piece.length], view) for piece, view in views.items()]
    return Runs(route.shape, momentum, parts)


def _chunk(layout: Layout, tile: Tile, rank: int, route: ParamSpec) -> Chunk:
    """Return which box of the parameter this rank's run of a tile is: some of its rows."""
    width, shape = layout.matrix.shape[1], route.shape
    rows_of_stack = route.stack // width
    first, skipped = tile.row, 0
    for start, rows in layout.matrix.blocks:
        if skipped <= first < skipped + rows:
            first += start // width - skipped
            break
        skipped += rows
    begin = max(tile.offset, tile.cut.run(rank)[0]) - tile.offset
    number, row = divmod(first + begin // tile.cols, rows_of_stack)
    rows = tile.run(rank)[1] // tile.cols
    if route.stacked:
        return (number, row, tile.col), (1, rows, tile.cols)
    if len(shape) == 2:
        return (row, tile.col), (rows, tile.cols)
    return (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
