"""The rule's name and its matrix state in DeepSpeed's checkpoints.

``engine.save_checkpoint`` and ``engine.load_checkpoint`` handle both: the name in client_state, and
the matrix state in a folder of torch.distributed.checkpoint below the tag's. DeepSpeed's own files
hold flat shards, in which there is no place for state that belongs to a whole matrix.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spectral_dist import checkpoint
from spectral_dist.checkpoint.checks import check_rule
from spectral_dist.checkpoint.files import METADATA, failing_together
from spectral_dist.checkpoint.plain import NotPlain
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.integrations.deepspeed.checkpoint_io import wrap_checkpoints
from spectral_dist.integrations.deepspeed.files import read_model_files
from spectral_dist.sharding import collectives

FOLDER = "spectral_dist"
"""The folder of matrix state below a tag's; also its key in client_state."""
RULE_KEY = "spectral_rule"
"""The key in client_state of the rule's name."""


def checkpoint_matrix_state(engine: Any, optimizer: SpectralOptimizer) -> None:
    """Make this engine's checkpoints hold the rule's name, and its matrix state, if it has any.

    A checkpoint of another rule is refused on every rank: its state would be read as something
    else, and state that it does not have would stay zero.

    Args:
        engine: built with the optimizer; its methods for checkpoints are replaced.
        optimizer: the one that the engine steps.
    """
    keeps_state = optimizer.keeps_matrix_state

    def before_save(folder: Path, *_: Any) -> dict[str, Any]:
        rule = {RULE_KEY: optimizer.rule_name}
        if not keeps_state:
            return rule
        optimizer.initialize_state()
        state_folder = (folder / FOLDER).absolute()
        identifier = checkpoint.save_matrix_state(state_folder, optimizer)
        return {**rule, FOLDER: {"folder": str(state_folder), "id": identifier}}

    def before_load(folder: Path, loads_states: bool) -> None:
        """Check the rule before anything has changed, if the files can be read as plain data."""
        with failing_together():
            if loads_states and collectives.is_first():
                try:
                    client_state = read_model_files(folder, first=True)[0]
                except NotPlain:
                    return  # a user's own objects in client_state: ``after_load`` checks the rule
                check_rule(str(folder), client_state.get(RULE_KEY), optimizer)

    def after_load(path: str, client_state: dict[str, Any], loads_states: bool) -> None:
        rule, entry = client_state.pop(RULE_KEY, None), client_state.pop(FOLDER, None)
        if not loads_states:
            return
        state_folder = None
        if isinstance(entry, str):  # as older releases have written it
            entry = {"folder": entry, "id": None}
        with failing_together():
            check_rule(path, rule, optimizer)
            if keeps_state:
                state_folder = _find(path, entry, engine.load_universal_checkpoint())
            elif entry is not None:
                raise ValueError(
                    f"{path} was saved with another optimizer than {optimizer.rule_name}, one that"
                    " keeps state of whole matrices; load it with that one, or with"
                    " load_optimizer_states=False"
                )
        if state_folder is not None:
            optimizer.initialize_state()
            checkpoint.load_matrix_state(state_folder, optimizer, entry and entry["id"])

    wrap_checkpoints(engine, after_load, before_save, before_load)


def _find(path: str, entry: dict[str, Any] | None, universal: bool) -> Path:
    """Return the folder that holds the matrix state of a checkpoint.

    That is a folder beside DeepSpeed's files. But DeepSpeed's universal converter does not copy it:
    then it is looked for where the checkpoint was saved before it was converted, and in the folder
    of the same tag beside the converted one.

    Args:
        path: of the loaded checkpoint, its folder or a file in it.
        entry: what ``before_save`` has left in client_state, or None.
        universal: whether a universal checkpoint was loaded.

    Raises:
        ValueError: there is no such folder; names the places.
    """
    tag = Path(path if os.path.isdir(path) else os.path.dirname(path))
    folders = [tag / FOLDER]
    if entry is not None and universal:
        saved_folder = Path(entry["folder"])
        folders += [saved_folder, tag.parent / saved_folder.parent.name / FOLDER]
    for folder in folders:
        if (folder / METADATA).is_file():
            return folder
    raise ValueError(
        f"the checkpoint {tag} has no matrix state: there is no {' or '.join(map(str, folders))}."
        f" If it is a universal one, copy the folder {FOLDER} of the tag that it was converted from"
        " into it; if it was saved with another optimizer, load it with"
        " load_optimizer_states=False"
    )
