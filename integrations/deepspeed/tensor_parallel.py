"""DeepSpeed's tensor parallelism (AutoTP): specs of the whole model, and the tiles of its weights.

AutoTP replaces layers by its own and leaves of each weight this rank's tile. So parameters are
recognized before it does, when they are whole, and their specs are kept with full shapes. Where a
tile lies in its weight, DeepSpeed's layers have written onto the parameter, for its checkpoints.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.weak import TensorWeakRef

from spectral_dist._error_help import explained
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat, _compat_tiles
from spectral_dist.params.classify import classify
from spectral_dist.params.heads import full_shape
from spectral_dist.params.spec import TAGS, ParamSpec
from spectral_dist.placement.ranks import RankGrid, group_or_none
from spectral_dist.placement.tiles import TilePiece
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules.options import ROUTING

_specs: weakref.WeakKeyDictionary[nn.Module, list[ParamSpec]] = weakref.WeakKeyDictionary()
"""The specs of each model that AutoTP has cut for an optimizer named in the JSON."""


def specs_of(model: nn.Module) -> list[ParamSpec] | None:
    """Return the specs that a model's parameters had before AutoTP cut them; None: it has not."""
    return _specs.get(model)


def grid_of(engine: Any) -> RankGrid:
    """Return the ranks that train an engine's model, by tensor- and data-parallel rank."""
    tensor, data = _compat_tiles.tensor_group(engine), _compat.data_group(engine)
    return RankGrid(group_or_none(tensor), group_or_none(data))


@explained
def partition(
    original: Callable[..., Any], engine: Any, model: nn.Module, tp_config: Any, ours: Iterable[str]
) -> Any:
    """Let DeepSpeed cut a model, and keep the specs that its parameters had before.

    Args:
        original: DeepSpeed's own method.
        engine: the one that is being built.
        model: whole.
        tp_config: the JSON's section "tensor_parallel".
        ours: the JSON types of this package.

    Returns:
        What DeepSpeed's method returns.

    Raises:
        ValueError: POET, a model that is cut already, or a layer whose tiles cannot be read.
    """
    client = engine.client_optimizer
    by_json = client is None and engine.optimizer_name() in ours
    if isinstance(client, POET) or (by_json and engine.optimizer_name() == "SpectralPOET"):
        raise ValueError(
            "POET rotates whole weights, and AutoTP replaces their layers by its own: leave"
            " tensor_parallel.autotp_size out, or name another optimizer"
        )
    if by_json and _compat_tiles.is_cut(model):
        raise ValueError(
            "an earlier deepspeed.initialize has cut this model by AutoTP, so its weights are not"
            " known any more; build the model anew"
        )
    specs: list[ParamSpec] = []
    if by_json:
        params = engine.optimizer_params() or {}
        specs = classify(model, **{name: params[name] for name in ROUTING if name in params})
    before = dict(model.named_parameters(remove_duplicate=False))
    result = original(engine, model, tp_config)
    after = dict(model.named_parameters(remove_duplicate=False))
    moved = {id(p): after[name] for name, p in before.items() if name in after}
    if by_json:
        _specs[model] = specs = [_moved(spec, moved) for spec in specs]
    elif isinstance(client, ShardedOptimizer):
        _follow(client, moved)
        specs = client.all_routes
    for parameter in before.values():
        spec = TAGS.get(parameter)  # type: ignore[no-untyped-call]
        if spec is not None:
            TAGS[moved[id(parameter)]] = _moved(spec, moved)
    ranks = _compat_tiles.tensor_group(engine).size()
    for spec in specs:
        if spec.kind == "matrix":
            pieces_of(spec, ranks)
    return result


def _moved(spec: ParamSpec, moved: dict[int, nn.Parameter]) -> ParamSpec:
    """Return a spec that refers to the parameter that AutoTP has put in place of its own."""
    parameter = moved[id(spec.parameter)]
    later = None if spec.later is None else replace(spec.later, reference=TensorWeakRef(parameter))
    return replace(spec, reference=TensorWeakRef(parameter), later=later)


def _follow(client: ShardedOptimizer, moved: dict[int, nn.Parameter]) -> None:
    """Make a client's optimizer step on the parameters that AutoTP has put in place of its own."""
    for group in client.param_groups:
        group["params"] = [moved.get(id(p), p) for p in group["params"]]
    client.routes = [[_moved(spec, moved) for spec in routes] for routes in client.routes]


def pieces_of(route: ParamSpec, ranks: int) -> list[TilePiece] | None:
    """Return the pieces into which AutoTP has cut a parameter; None: every rank has all of it.

    Args:
        route: of a matrix.
        ranks: the number of tensor-parallel ranks.

    Raises:
        ValueError: DeepSpeed does not say where the pieces lie, or they are no rectangles of the
            weight, each on one rank.
    """
    tiling, reason = _compat_tiles.tiling_of(route.parameter)
    local = full_shape(route.parameter)
    if tiling is None and not reason and local == route.shape:
        return None
    if tiling is None:
        raise _unreadable(route, reason or f"DeepSpeed does not say how it has cut {local} of it")
    everywhere = frozenset(range(ranks))
    if all(p.locations == everywhere and p.scale == 1 for p in tiling.pieces):
        return None
    if math.prod(tiling.shape) != math.prod(route.shape):
        raise ValueError(
            f"{route.name} of shape {tiling.shape} was recognized as {route.shape}, after AutoTP"
            " had cut it. Build the optimizer's param_groups before deepspeed.initialize, or name"
            " its type in the JSON"
        )
    if any(m.transposed for m in route.matrices):
        raise _unreadable(route, "it is stored (in, out), and AutoTP's layers cut (out, in)")
    width = route.matrices[0].width
    pieces = []
    for piece in tiling.pieces:
        if len(piece.locations) > 1 or piece.scale != 1:
            raise _unreadable(route, "several ranks hold, or scale, the same part of it")
        if len(piece.shape) != 2 or piece.strides != (width, 1) or piece.tile_strides[1] != 1:
            raise _unreadable(route, "it is not cut into rectangles of its rows and columns")
        row, col = divmod(piece.offset, width)
        (rank,) = piece.locations
        rows, cols = piece.shape
        pieces.append(
            TilePiece(rank, row, col, rows, cols, piece.tile_offset, piece.tile_strides[0])
        )
    idle = set(range(ranks)) - {piece.tensor_rank for piece in pieces}
    if idle:
        raise ValueError(
            f"tensor_parallel.autotp_size is {ranks}, but {route.name} has parts for"
            f" {ranks - len(idle)} ranks only (one for each key-value head, say): write a size of"
            f" at most {ranks - len(idle)}"
        )
    if sum(p.rows * p.cols for p in pieces) != math.prod(route.shape):
        raise _unreadable(route, "its pieces do not add up to the weight")
    return sorted(pieces, key=lambda p: (p.row, p.col))


def _unreadable(route: ParamSpec, reason: str) -> ValueError:
    """Return the error for a weight whose tiles are not known."""
    return ValueError(
        f"AutoTP has cut {route.name} in a way that is not supported ({reason}). Leave it to AdamW:"
        f' scalars=["{route.name}"]; or leave its layer whole by a partition_config in the JSON'
    )


def numels_of(route: ParamSpec, ranks: int) -> list[int]:
    """Return the elements of each tensor-parallel rank's tile of a matrix that AutoTP has cut."""
    numels = [0] * ranks
    for piece in pieces_of(route, ranks) or ():
        numels[piece.tensor_rank] += piece.rows * piece.cols
    return numels


def with_tiles_apart(groups: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Return parameter groups of which none has both matrices that AutoTP has cut and whole ones.

    ZeRO lays a group's parameters into one flat tensor, which is stepped as one.

    Args:
        groups: with their routes.
        ranks: the number of tensor-parallel ranks.
    """
    apart = []
    for group in groups:
        subsets: dict[bool, list[ParamSpec]] = {}
        for route in group["routes"]:
            is_cut = group["kind"] != "matrix" or pieces_of(route, ranks) is not None
            subsets.setdefault(is_cut, []).append(route)
        apart += [
            {**group, "routes": routes, "params": [route.parameter for route in routes]}
            for _, routes in sorted(subsets.items(), reverse=True)
        ]
    return apart
