"""Matrix state in DeepSpeed's checkpoints: a folder of torch.distributed.checkpoint under the tag.

``engine.save_checkpoint`` and ``engine.load_checkpoint`` take it along. DeepSpeed's own files are
of flat shards, in which what belongs to a whole matrix has no place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spectral_dist import checkpoint
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.integrations.deepspeed.client_state import around_checkpoints
from spectral_dist.sharding import collectives

FOLDER = "spectral_dist"
"""Beside DeepSpeed's files of a tag; also the key in their client_state."""


def keep_matrix_state(engine: Any, optimizer: SpectralOptimizer) -> None:
    """Have this engine's checkpoints carry the optimizer's matrix state, if it has any.

    A checkpoint of a rule with other state is refused on every rank: zeros would pass for it.
    """
    keeps_state = optimizer.keeps_matrix_state

    def before_save(folder: Path, *given: Any) -> dict[str, str]:
        if not keeps_state:
            return {}
        optimizer.locate()
        beside = (folder / FOLDER).absolute()
        checkpoint.save_matrix_state(beside, optimizer)
        return {FOLDER: str(beside)}

    def after_load(path: str, client_state: dict[str, Any], wanted: bool) -> None:
        written = client_state.pop(FOLDER, None)
        if not wanted:
            return
        error: Exception | None = None
        source = None
        try:
            if keeps_state:
                source = _find(path, written)
            elif written is not None:
                raise ValueError(
                    f"{path} was saved with an optimizer that keeps state of whole matrices, as"
                    f" SpectralSUMO, and holds nothing that {type(optimizer).__name__} goes on"
                    " with; load it with that one, or with load_optimizer_states=False"
                )
        except ValueError as raised:
            error = raised
        collectives.raise_together(error, [collectives.world()])
        if source is not None:
            optimizer.locate()
            checkpoint.load_matrix_state(source, optimizer)

    around_checkpoints(engine, after_load, before_save)


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
