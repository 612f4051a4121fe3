"""Checkpoints by torch.distributed.checkpoint: save on n ranks of one layout, load on m of another.

Optimizer state is keyed by parameter name, with global offsets: DTensors where parameters are
DTensors, whole tensors where every rank has them, ``Runs`` where momentum is at its owner alone;
matrix state by matrix name, as ``Runs``. Of parameters, all ranks have the same keys, from before
the first step.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from spectral_dist.checkpoint_metadata import check_entries
from spectral_dist.core.matrix_state import Part, check_saved
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.core.units import MatrixUnit
from spectral_dist.params.classify import unwrap
from spectral_dist.params.spec import Route
from spectral_dist.poet.convert import plain_name
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.sharding import collectives
from spectral_dist.sharding.layout import Layout, Tile

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) in the whole parameter."""
NOT_SAVED = ("params", "id", "routes")
SKEW = "skew_in"
"""What every layer of POET has, and no other."""


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
        """No operation: it is not a tensor, only to be saved and loaded."""
        raise NotImplementedError(f"{func} of momentum that is spread over its owners")

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


def state_dict(optimizer: ShardedOptimizer, *, saving: bool = True) -> dict[str, Any]:
    """{"state": {parameter: {"step", "exp_avg", ...}}, "groups": JSON}, for DCP to save or load.

    Also {"matrices": ``matrix_state``} if there is any. Its tensors are the optimizer's own. A
    collective call the first time.
    """
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        routes = optimizer.routes[group["id"]]
        for unit in optimizer.units(group):
            for index, i in enumerate(unit.tensors):
                entry = dict(optimizer.state[group["params"][i]])
                if isinstance(unit, MatrixUnit) and unit.momentum_at_owner:
                    entry["exp_avg"] = _runs(unit, index, routes[i], entry["exp_avg"])
                state[routes[i].name] = entry
        plain = {k: v for k, v in group.items() if k not in NOT_SAVED}
        groups.append({**plain, "names": [route.name for route in routes]})
    found: dict[str, Any] = {"state": state, "groups": json.dumps(groups, default=float)}
    matrices = matrix_state(optimizer, saving)
    return {**found, "matrices": matrices} if matrices else found


def matrix_state(optimizer: ShardedOptimizer, saving: bool) -> dict[str, dict[str, Runs]]:
    """{matrix: {quantity: what this rank keeps of it}}, for DCP to save or load.

    What several ranks have is among what each of them loads, and what its owner saves.
    """
    found: dict[str, dict[str, Runs]] = {}
    for part in _parts(optimizer):
        if part.is_primary or not saving:
            where = (part.offsets or (0,), tuple(part.values.shape) or (1,))  # DCP cuts no scalars
            whole = Runs(part.shape or (1,), part.values, [(where, part.values)])
            found.setdefault(part.matrix, {})[part.name] = whole
    return found


def _parts(optimizer: ShardedOptimizer) -> Iterator[Part]:
    """Iterate over the optimizer's matrix state, if it has matrices."""
    if isinstance(optimizer, SpectralOptimizer):
        yield from optimizer.matrix_parts()


def save_matrix_state(folder: str | Path, optimizer: ShardedOptimizer) -> None:
    """Write the matrix state alone, for a framework that saves the rest. A collective call."""
    with _alone_is_fine():
        dcp_save({"matrices": matrix_state(optimizer, True)}, checkpoint_id=str(folder))


def load_matrix_state(folder: str | Path, optimizer: ShardedOptimizer) -> None:
    """Restore what ``save_matrix_state`` has written, on any number of ranks. A collective call.

    Raises:
        ValueError: it is of other matrices, or of another rank.
    """
    with _failing_together():
        saved = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        check_matrix_state(optimizer, saved, "matrices.")
    with _alone_is_fine():
        dcp_load({"matrices": matrix_state(optimizer, False)}, checkpoint_id=str(folder))


def check_matrix_state(optimizer: ShardedOptimizer, saved: Mapping[str, Any], prefix: str) -> None:
    """Raise if a checkpoint's metadata has other matrix state than this rank's.

    Raises:
        ValueError: names the matrix, and what must have been changed.
    """
    for part in _parts(optimizer):
        entry = saved.get(f"{prefix}{part.matrix}.{part.name}")
        shape = None if entry is None else tuple(entry.size)
        check_saved(part, () if shape == (1,) and not part.shape else shape)
    kept = optimizer.kept_names() if isinstance(optimizer, SpectralOptimizer) else {}
    for key in saved:
        matrix, _, name = key.removeprefix(prefix).rpartition(".")
        if key.startswith(prefix) and name not in kept.get(matrix, {name}):
            raise ValueError(
                f"the checkpoint has {name} of {matrix}, which {type(optimizer).__name__} does not"
                " keep: it was saved with another optimizer, or with another rank of this one"
            )


def load_state_dict(optimizer: ShardedOptimizer, loaded: Mapping[str, Any]) -> None:
    """Take the options of the groups of a ``state_dict`` that DCP has filled.

    Its tensors are the optimizer's own, so they are in place already.

    Raises:
        ValueError: a parameter that is of another kind now, or groups that were divided otherwise.
    """
    with _failing_together():
        _take_groups(optimizer, json.loads(loaded["groups"]))
    for call in optimizer.after_load:
        call()


def _take_groups(optimizer: ShardedOptimizer, saved: list[dict[str, Any]]) -> None:
    by_name = {name: group for group in saved for name in group.pop("names")}
    for group in optimizer.param_groups:
        routes = optimizer.routes[group["id"]]
        for route in routes:
            old, first = by_name.get(route.name), by_name.get(routes[0].name)
            if old is None or old["kind"] != group["kind"]:
                was = "not in it" if old is None else f"of kind {old['kind']!r}"
                raise ValueError(
                    f"{route.name} is of kind {group['kind']!r} here, but {was} in the checkpoint;"
                    " build the optimizer with the matrices, scalars and split it was saved with"
                )
            if old != first:
                raise ValueError(
                    f"{route.name} and {routes[0].name} are in one parameter group here, but in two"
                    " with different options in the checkpoint; build the groups as they were"
                )
            saved_group = {k: tuple(v) if k == "betas" else v for k, v in old.items()}
            optimizer.fill_in(saved_group, group)
            group.update(saved_group)


def save(folder: str | Path, model: nn.Module, optimizer: ShardedOptimizer, **extra: Any) -> None:
    """Write the model, the optimizer and what else is given (schedules, counters) into ``folder``.

    A collective call. Any layout can be loaded from it again: one process, DDP, FSDP2, HSDP, TP.
    ``extra`` is that of rank 0, and may hold what ``torch.load(weights_only=True)`` accepts.
    """
    file = io.BytesIO()
    torch.save(extra, file)
    content: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": state_dict(optimizer),
    }
    if collectives.is_first():  # DCP would keep that of any rank
        content["extra"] = file.getvalue()
    with _alone_is_fine():
        dcp_save(content, checkpoint_id=str(folder))


def load(folder: str | Path, model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Restore what ``save`` has written, on any number of ranks; its ``extra``. A collective call.

    Raises:
        ValueError: no checkpoint there, or one of other parameters or kinds, or rotated otherwise.
    """
    with _failing_together():
        if not Path(folder, ".metadata").is_file():
            raise ValueError(f"{folder} holds no checkpoint: there is no .metadata in it")
    content: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": state_dict(optimizer, saving=False),
        "extra": b"",
    }
    with _failing_together():
        saved = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        layers = _rotated_layers(folder, model, saved)
    _check_settings(folder, layers, content["model"])  # which says more than shapes do
    with _failing_together():
        check_entries(folder, content["model"], content["optimizer"]["state"], saved)
        former = _former_state(optimizer, saved)
        if former:
            content["optimizer"].pop("matrices")
        else:
            check_matrix_state(optimizer, saved, "optimizer.matrices.")
    with _alone_is_fine():
        dcp_load(content, checkpoint_id=str(folder))
        if former:
            dcp_load({"optimizer": {"state": former}}, checkpoint_id=str(folder))
    if former and isinstance(optimizer, SpectralOptimizer):
        optimizer.load_former_state(former)
    set_model_state_dict(model, content["model"])
    load_state_dict(optimizer, content["optimizer"])
    extra: dict[str, Any] = torch.load(io.BytesIO(content["extra"]), weights_only=True)
    return extra


def _former_state(
    optimizer: ShardedOptimizer, saved: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Return whole tensors to load what is matrix state now, and was shard state when saved."""
    if not isinstance(optimizer, SpectralOptimizer):
        return {}
    names = optimizer.former_state()
    there = any(key.startswith("optimizer.matrices.") for key in saved)
    if not names or there:
        return {}
    return {
        route.name: {old: torch.empty(route.shape) for old in names.values()}
        for route in optimizer.all_routes
        if route.kind == "matrix"
        and all(f"optimizer.state.{route.name}.{old}" in saved for old in names.values())
    }


def _rotated_layers(
    folder: str | Path, model: nn.Module, saved: Mapping[str, Any]
) -> dict[str, PoetLayer]:
    """Return POET's layers by prefix of their parameters' names.

    Raises:
        ValueError: other layers are POET's than in the checkpoint.
    """
    layers = {
        f"{plain_name(name)}.".lstrip("."): module
        for name, module in unwrap(model)[0].named_modules()
        if isinstance(module, PoetLayer)
    }
    there = {name[len("model.") : -len(SKEW)] for name in saved if name.endswith(SKEW)}
    for prefix in sorted(there ^ layers.keys()):
        if prefix in there:
            raise ValueError(
                f"{prefix}weight is rotated by POET in {folder}, and not here; call"
                " spectral_dist.poet.convert(model, ...) as it was called then, and load that; or"
                " make plain weights of it there with spectral_dist.poet.export"
            )
        raise ValueError(
            f"{prefix}weight is rotated by POET here, and not in {folder}; load that into the plain"
            " model, and call spectral_dist.poet.convert(model, ...) after it"
        )
    return layers


def _check_settings(
    folder: str | Path, layers: Mapping[str, PoetLayer], here: Mapping[str, Any]
) -> None:
    """Raise a ValueError if layers were rotated by other settings. A collective call.

    Before anything is loaded, as the model's tensors are written in place.
    """
    if not layers:
        return
    states = {name: here[name] for name in (f"{prefix}_extra_state" for prefix in layers)}
    with _alone_is_fine():
        dcp_load({"model": states}, checkpoint_id=str(folder))
    with _failing_together():
        for layer, state in zip(layers.values(), states.values(), strict=True):
            layer.check_extra_state(state)


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    """Raise on every rank of the job what any of them raises inside, where none may wait."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    collectives.raise_together(error, [collectives.world()])


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without torch's warning that one process saves and loads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _runs(unit: MatrixUnit, index: int, route: Route, momentum: Tensor) -> Runs:
    """The momentum that this rank keeps of tensor ``index``, run by run."""
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


def _chunk(layout: Layout, tile: Tile, rank: int, route: Route) -> Chunk:
    """Which box of the parameter this rank's run of a tile is: some of its rows."""
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
