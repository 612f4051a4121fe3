"""Matrix state in DeepSpeed's checkpoints: a folder of torch.distributed.checkpoint under the tag.

``engine.save_checkpoint`` and ``engine.load_checkpoint`` take it along. DeepSpeed's own files are
of flat shards, in which what belongs to a whole matrix has no place.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectral_dist import checkpoint
from spectral_dist.optimizer import SpectralOptimizer

FOLDER = "spectral_dist"
"""Beside DeepSpeed's files of a tag; also the key in their client_state."""


def keep_matrix_state(engine: Any, optimizer: SpectralOptimizer) -> None:
    """Have this engine's checkpoints carry the optimizer's matrix state, if it has any."""
    if optimizer.rule.momentum:
        _refuse_others(engine)
        return
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
        folder = Path(save_dir, tag, FOLDER).absolute()
        optimizer.locate()
        # first: DeepSpeed writes `latest` when it is done, and all of the checkpoint must be there
        checkpoint.save_matrix_state(folder, optimizer)
        client_state = {**(client_state or {}), FOLDER: str(folder)}
        return save(save_dir, tag, client_state, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        path, client_state = load(load_dir, tag, *args, **kwargs)
        if path is None:
            return path, client_state
        written = client_state.pop(FOLDER, None)
        if wants_state(args, kwargs):
            optimizer.locate()
            checkpoint.load_matrix_state(_find(path, written), optimizer)
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def _refuse_others(engine: Any) -> None:
    """Have a rule with momentum refuse a checkpoint without: its zeros would pass for momentum."""
    load = engine.load_checkpoint

    @functools.wraps(load)
    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        path, client_state = load(load_dir, tag, *args, **kwargs)
        if client_state and FOLDER in client_state and wants_state(args, kwargs):
            raise ValueError(
                f"{path} was saved with SUMO, and holds no momentum for this optimizer; load it"
                " with SpectralSUMO, or with load_optimizer_states=False"
            )
        return path, client_state

    engine.load_checkpoint = load_checkpoint


def wants_state(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``load_checkpoint`` is to load optimizer states, by what follows the tag."""
    names = ("load_module_strict", "load_optimizer_states", "load_lr_scheduler_states",
             "load_module_only")  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given.get("load_optimizer_states", True) and not given.get("load_module_only", False)


def _find(path: str, written: str | None) -> Path:
    """Where the matrix state of a checkpoint is, which the universal converter leaves behind.

    Raises:
        ValueError: neither beside DeepSpeed's files, nor where they were converted from.
    """
    tag = Path(path if os.path.isdir(path) else os.path.dirname(path))
    found = [tag / FOLDER]
    if written is not None:
        found += [Path(written), tag.parent / Path(written).parent.name / FOLDER]
    for folder in found:
        if (folder / ".metadata").is_file():
            return folder
    raise ValueError(
        f"the checkpoint {tag} has no matrix state: there is no {' or '.join(map(str, found))}. If"
        f" it is a universal one, copy the folder {FOLDER} of the tag that it was converted from"
        " into it; if it was saved with another optimizer, load it with"
        " load_optimizer_states=False"
    )
