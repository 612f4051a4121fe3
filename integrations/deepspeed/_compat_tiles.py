"""The private names of DeepSpeed's tensor parallelism (AutoTP); the others stand in ``_compat``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn

from spectral_dist._error_help import explained
from spectral_dist.integrations.deepspeed._compat import (
    DeepSpeedEngine,
    _version_tuple,
    attribute,
)

Partition = Callable[[Callable[..., Any], DeepSpeedEngine, nn.Module, Any], Any]
"""A function of (DeepSpeed's own method, the engine, the model, the section "tensor_parallel")."""
KNOWS_TILES = _version_tuple(deepspeed.__version__) >= (0, 19, 8)
"""Whether AutoTP's layers say where their tiles lie, as the tests have found from 0.19.8 on."""


@explained
def wrap_tensor_parallel(partition: Partition) -> None:
    """Wrap the method by which an engine lets AutoTP cut its model, where tiles are known.

    Args:
        partition: called in its place.
    """
    if not KNOWS_TILES:
        return  # ``config.refuse`` refuses AutoTP there
    configure = DeepSpeedEngine._configure_tensor_parallel

    @functools.wraps(configure)
    def configured(engine: DeepSpeedEngine, model: nn.Module, tp_config: Any) -> Any:
        return partition(configure, engine, model, tp_config)

    DeepSpeedEngine._configure_tensor_parallel = configured


def tensor_group(engine: Any) -> dist.ProcessGroup:
    """Return the process group of the ranks over which AutoTP cuts an engine's weights."""
    group: dist.ProcessGroup = attribute(engine, "mpu").get_tensor_model_parallel_group()
    return group


def is_cut(model: nn.Module) -> bool:
    """Return whether AutoTP has cut a model."""
    return getattr(model, "ds_autotp_parsed", False)


@dataclass(frozen=True)
class StridedPart:
    """A part of a weight, as the arguments of torch.as_strided in the weight and in the tile.

    Attributes:
        shape: of the part.
        offset, strides: in the flattened weight.
        tile_offset, tile_strides: in the flattened tile.
        locations: the tensor-parallel ranks that hold it.
        scale: that they hold it multiplied by.
    """

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    tile_offset: int
    tile_strides: tuple[int, ...]
    locations: frozenset[int]
    scale: float


@dataclass(frozen=True)
class CutWeight:
    """How AutoTP has cut a weight: its whole shape, and all non-empty pieces."""

    shape: tuple[int, ...]
    pieces: tuple[StridedPart, ...]


def tiling_of(parameter: Tensor) -> tuple[CutWeight | None, str]:
    """Return how AutoTP has cut a parameter, and DeepSpeed's reason why that is not known.

    (None, "") for a parameter that it has not touched.
    """
    meta = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    if meta is None:
        return None, ""
    conversion = meta["conversion"]
    entry = conversion.get("affine_map")
    if entry is None:
        return None, conversion["unsupported_reason"] or "DeepSpeed does not describe it"
    pieces = [
        StridedPart(
            tuple(piece["shape"]), piece["source"][0], tuple(piece["source"][1]),
            piece["dest"][0], tuple(piece["dest"][1]), frozenset(piece["locations"]),
            piece.get("scale", 1.0),
        )
        for tile in entry["ranks"].values()
        for piece in tile["pieces"]
        if 0 not in piece["shape"]
    ]  # fmt: skip
    return CutWeight(tuple(entry["logical_shape"]), tuple(pieces)), ""


def numel_of(parameter: Tensor) -> int:
    """Return the elements of a parameter or tile, which stage 3 may have emptied."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
