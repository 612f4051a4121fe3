"""Checkpoints by torch.distributed.checkpoint: save on n ranks of one layout, load on m of another.

Optimizer state is keyed by parameter name, with global offsets: DTensors where parameters are
DTensors, whole tensors where every rank has them, a ``ChunkedTensor`` where only the owner stores
momentum; matrix state is keyed by matrix name, as ``ChunkedTensor``. All ranks have the same keys
of parameters, from before the first step. ``checkpoint.files`` writes and checks the files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from spectral_dist._error_help import explained
from spectral_dist.checkpoint import files
from spectral_dist.checkpoint.background import BACKGROUND
from spectral_dist.checkpoint.checks import check_entries, check_groups, check_rule, take_groups
from spectral_dist.checkpoint.chunked_tensor import ChunkedTensor, momentum_runs
from spectral_dist.checkpoint.files import failing_together
from spectral_dist.checkpoint.names import MATRICES, STATE, Names, names_in, names_of
from spectral_dist.checkpoint.plain import check_plain
from spectral_dist.core.matrix_state import MatrixStatePart, check_saved
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.core.units import MatrixUnit
from spectral_dist.core.whole_state import without_matrices
from spectral_dist.params.classify import unwrap
from spectral_dist.params.spec import plain_name
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.sharding import collectives

NOT_SAVED = ("params", "id", "routes")
SKEW = "skew_in"
"""The name of a parameter that every layer of POET has, and no other module."""


@explained
def state_dict(optimizer: ShardedOptimizer, *, saving: bool = True) -> dict[str, Any]:
    """Return an optimizer's state for torch.distributed.checkpoint; collective the first time.

    Args:
        optimizer: whose tensors are in it, not copies of them.
        saving: whether it is to be saved: then a rank that shares matrix state with its owner
            leaves it out. To load, each rank has all its own.

    Returns:
        {"state": {parameter: {"step", "exp_avg", ...}}, "groups": JSON}, and {"matrices":
        ``matrix_state``} if there is any.
    """
    return _state_dict(optimizer, names_of(optimizer), saving)


def _state_dict(optimizer: ShardedOptimizer, names: Names, saving: bool) -> dict[str, Any]:
    """Return ``state_dict`` with these names of parameters and matrices."""
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        routes = optimizer.routes[group["id"]]
        for unit in optimizer.units(group):
            for index, i in enumerate(unit.tensors):
                entry = without_matrices(optimizer.state[group["params"][i]])
                if isinstance(unit, MatrixUnit) and unit.momentum_at_owner:
                    entry["exp_avg"] = momentum_runs(unit, index, routes[i], entry["exp_avg"])
                state[names.of_parameters[routes[i].name]] = entry
        plain = {k: v for k, v in group.items() if k not in NOT_SAVED}
        param_names = [names.of_parameters[route.name] for route in routes]
        groups.append({**plain, "names": param_names})
    content: dict[str, Any] = {"state": state, "groups": json.dumps(groups, default=float)}
    matrices = matrix_state(optimizer, names, saving)
    return {**content, "matrices": matrices} if matrices else content


def matrix_state(
    optimizer: ShardedOptimizer, names: Names, saving: bool
) -> dict[str, dict[str, ChunkedTensor]]:
    """Return {matrix: {quantity: this rank's part of it}}, for torch.distributed.checkpoint.

    What several ranks store is loaded by each of them, and saved by its owner.

    Args:
        optimizer: whose tensors are in it.
        names: of parameters and matrices in the checkpoint.
        saving: whether it is to be saved, and not loaded.
    """
    content: dict[str, dict[str, ChunkedTensor]] = {}
    for part in _parts(optimizer):
        if part.is_primary or not saving:
            chunk = (part.offsets or (0,), tuple(part.values.shape) or (1,))  # DCP cuts no scalars
            tensor = ChunkedTensor(part.shape or (1,), part.values, [(chunk, part.values)])
            content.setdefault(names.of_matrices[part.matrix], {})[part.name] = tensor
    return content


def _parts(optimizer: ShardedOptimizer) -> Iterator[MatrixStatePart]:
    """Iterate over the optimizer's matrix state, if it has matrices."""
    if isinstance(optimizer, SpectralOptimizer):
        yield from optimizer.matrix_parts()


@explained
def save_matrix_state(folder: str | Path, optimizer: ShardedOptimizer) -> str:
    """Write only the matrix state, for a framework that saves the rest; a collective call.

    Returns:
        The id of what was written, for ``load_matrix_state``.
    """
    optimizer.check_last_step()
    return files.write(folder, {"matrices": matrix_state(optimizer, names_of(optimizer), True)})


@explained
def load_matrix_state(
    folder: str | Path, optimizer: ShardedOptimizer, saved_as: str | None = None
) -> None:
    """Load what ``save_matrix_state`` has written, on any number of ranks; a collective call.

    Args:
        folder: of the checkpoint.
        optimizer: whose matrix state is loaded.
        saved_as: the id that ``save_matrix_state`` returned, if it is known.

    Raises:
        ValueError: before anything has changed, if the checkpoint is damaged, of another save, of
            other matrices, or of another option ``rank``.
    """
    checked = files.verify(folder)
    with failing_together():
        metadata = files.read_metadata(folder)
        if saved_as is not None and files.save_id(metadata) != saved_as:
            raise ValueError(
                f"{folder} is of another save than the checkpoint that it is to be loaded with; put"
                " the folder there that was saved with it"
            )
        names = names_of(optimizer)
        check_matrix_state(optimizer, names, metadata.state_dict_metadata, "matrices.")
    content = {"matrices": matrix_state(optimizer, names, False)}
    if not checked:
        files.read(folder, content, rehearse=True)
    files.read(folder, content)


@explained
def check_matrix_state(
    optimizer: ShardedOptimizer, names: Names, saved: Mapping[str, Any], prefix: str
) -> None:
    """Check that a checkpoint's metadata has this rank's matrix state, and of these no other.

    Args:
        optimizer: that is to be loaded.
        names: of matrices in the checkpoint.
        saved: the checkpoint's metadata by key.
        prefix: of the keys of matrix state.

    Raises:
        ValueError: names the matrix, and what must have been changed.
    """
    for part in _parts(optimizer):
        entry = saved.get(f"{prefix}{names.of_matrices[part.matrix]}.{part.name}")
        shape = None if entry is None else tuple(entry.size)
        check_saved(part, () if shape == (1,) and not part.shape else shape)
    kept_names = optimizer.kept_names() if isinstance(optimizer, SpectralOptimizer) else {}
    known = {names.of_matrices[matrix]: kept for matrix, kept in kept_names.items()}
    for key in saved:
        matrix, _, name = key.removeprefix(prefix).rpartition(".")
        is_elsewhere = matrix not in known and not optimizer.placement.has_all_matrices
        if not key.startswith(prefix) or name in known.get(matrix, ()) or is_elsewhere:
            continue
        if matrix not in known:
            what = f"{name} of {matrix}, which is not here: it is of another model"
            raise ValueError(f"the checkpoint has {what}")
        raise ValueError(
            f"the checkpoint has {name} of {matrix}, which {optimizer.rule_name} does not keep: it"
            " was saved with another optimizer, or with another rank of this one"
        )


@explained
def load_state_dict(optimizer: ShardedOptimizer, loaded: Mapping[str, Any]) -> None:
    """Set the options of groups from a ``state_dict`` that torch.distributed.checkpoint has filled.

    Its tensors are the optimizer's own, so they are loaded already.

    Args:
        optimizer: whose options are set.
        loaded: the ``state_dict``.

    Raises:
        ValueError: it is of another rule, a parameter is of another kind now, or groups were
            divided otherwise.
    """
    with failing_together():
        groups = json.loads(loaded["groups"])
        check_rule("the checkpoint", groups[0].get("rule") if groups else None, optimizer)
        names = names_of(optimizer).of_parameters
        check_groups(optimizer, names, groups)
    take_groups(optimizer, names, groups)
    for call in optimizer.after_load:
        call()


@explained
def save(folder: str | Path, model: nn.Module, optimizer: ShardedOptimizer, **extra: Any) -> None:
    """Write a model, its optimizer and other values into a folder; a collective call.

    It can be loaded under any layout: one process, DDP, FSDP2, HSDP, TP. The save is complete when
    ``checkpoint.files.MANIFEST`` is in the folder, which is written last.

    Args:
        folder: that all ranks see; what is in it is overwritten.
        model: as the user has it, in its wrappers.
        optimizer: of the model.
        extra: other values (schedules, counters), of which those of rank 0 are saved: what
            ``torch.load(weights_only=True)`` accepts.

    Raises:
        ValueError: on every rank and before anything was written, if there is something in
            ``extra``, or beside tensors in the model's state, that could not be loaded.
        RuntimeError: on every rank, if one could not write.
    """
    files.write(folder, _content(model, optimizer, extra))


@explained
def async_save(
    folder: str | Path, model: nn.Module, optimizer: ShardedOptimizer, **extra: Any
) -> Future[str]:
    """Save as ``save`` does, but in the background; a collective call.

    Saved are the values at the time of the call: it waits for the save before this one, and copies
    everything to the host's memory. Ranks then write in a thread and a process group of their own,
    while training goes on. Arguments are those of ``save``.

    Returns:
        A future, done when the save is complete; its ``result()`` raises what ``save`` would.

    Raises:
        ValueError: as ``save`` does, at once.
    """
    return BACKGROUND.write(folder, _content(model, optimizer, extra))


def _content(
    model: nn.Module, optimizer: ShardedOptimizer, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a checkpoint holds, checked to be loadable; a collective call."""
    optimizer.check_last_step()
    content: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": _state_dict(optimizer, names_of(optimizer, model), True),
    }
    with failing_together():
        others = {k: v for k, v in content["model"].items() if not isinstance(v, Tensor)}
        check_plain(others, "the model's state")
        if collectives.is_first():  # DCP would keep that of any rank
            check_plain(extra, "what is saved beside model and optimizer")
            file = io.BytesIO()
            torch.save(dict(extra), file)
            content["extra"] = file.getvalue()
    return content


@explained
def load(folder: str | Path, model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Load what ``save`` has written, on any number of ranks; a collective call.

    Args:
        folder: of the checkpoint.
        model, optimizer: built as those that were saved, under any layout; they are written.

    Returns:
        The ``extra`` values that were saved.

    Raises:
        ValueError: on every rank and before anything has changed, if there is no checkpoint, if it
            is damaged or not complete, or if it is of another optimizer, of other parameters or
            kinds, or rotated otherwise.
    """
    checked = files.verify(folder)
    model_state = get_model_state_dict(model)
    optimizer.initialize_state()
    with failing_together():
        saved = files.read_metadata(folder).state_dict_metadata
        names = names_in(names_of(optimizer, model), saved)
        layers = _rotated_layers(folder, model, saved)
    _check_settings(folder, layers, model_state)  # first, as it says more than other shapes would
    plain: dict[str, Any] = {"optimizer": {"groups": ""}, "extra": b""}
    files.read(folder, plain)
    ours = _state_dict(optimizer, names, False)
    with failing_together():
        groups = json.loads(plain["optimizer"]["groups"])
        check_rule(str(folder), groups[0].get("rule") if groups else None, optimizer)
        check_entries(folder, model, model_state, ours["state"], saved)
        former = _former_state(optimizer, names, saved)
        if former:
            ours.pop("matrices")
        else:
            check_matrix_state(optimizer, names, saved, MATRICES)
        check_groups(optimizer, names.of_parameters, groups)
        extra: dict[str, Any] = torch.load(io.BytesIO(plain["extra"]), weights_only=True)
    tensors = {k: v for k, v in ours.items() if k != "groups"}
    content: dict[str, Any] = {"model": model_state, "optimizer": tensors}
    for name, state in former.items():
        content["optimizer"]["state"][names.of_parameters[name]] |= state
    if not checked:
        files.read(folder, content, rehearse=True)
    files.read(folder, content)
    if former and isinstance(optimizer, SpectralOptimizer):
        optimizer.load_former_state(former)
    set_model_state_dict(model, content["model"])
    take_groups(optimizer, names.of_parameters, groups)
    for call in optimizer.after_load:
        call()
    return extra


def _former_state(
    optimizer: ShardedOptimizer, names: Names, saved: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Return empty whole tensors for matrix state that an older release saved as shard state.

    Args:
        optimizer: that is to be loaded.
        names: of parameters in the checkpoint.
        saved: the checkpoint's metadata by key.

    Returns:
        {parameter: {shard state: whole tensor}}; nothing if the checkpoint has matrix state.
    """
    if not isinstance(optimizer, SpectralOptimizer):
        return {}
    former = optimizer.former_state()
    has_matrix_state = any(key.startswith(MATRICES) for key in saved)
    if not former or has_matrix_state:
        return {}
    return {
        route.name: {old: torch.empty(route.shape) for old in former.values()}
        for route in optimizer.all_routes
        if route.kind == "matrix"
        and all(
            f"{STATE}{names.of_parameters[route.name]}.{old}" in saved for old in former.values()
        )
    }


def _rotated_layers(
    folder: str | Path, model: nn.Module, saved: Mapping[str, Any]
) -> dict[str, PoetLayer]:
    """Return POET's layers by the prefix of their parameters' names.

    Raises:
        ValueError: the checkpoint has other layers of POET's than the model.
    """
    layers = {
        f"{plain_name(name)}.".lstrip("."): module
        for name, module in unwrap(model)[0].named_modules()
        if isinstance(module, PoetLayer)
    }
    saved_prefixes = {name[len("model.") : -len(SKEW)] for name in saved if name.endswith(SKEW)}
    for prefix in sorted(saved_prefixes ^ layers.keys()):
        if prefix in saved_prefixes:
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
    folder: str | Path, layers: Mapping[str, PoetLayer], model_state: Mapping[str, Any]
) -> None:
    """Raise a ValueError if POET's layers were saved with other settings; a collective call.

    It must be called before anything is loaded, as the model's tensors are written in place.

    Args:
        folder: of the checkpoint.
        layers: POET's layers by the prefix of their parameters' names.
        model_state: of the model, by name.
    """
    if not layers:
        return
    states = {name: model_state[name] for name in (f"{prefix}_extra_state" for prefix in layers)}
    content = {"model": states}
    files.read(folder, content)
    with failing_together():
        for layer, state in zip(layers.values(), content["model"].values(), strict=True):
            layer.check_extra_state(state)
