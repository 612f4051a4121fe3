"""The rule and its matrix state in DeepSpeed's checkpoints.

``engine.save_checkpoint`` and ``engine.load_checkpoint`` take them along: the rule's name in
client_state, matrix state in a folder of torch.distributed.checkpoint under the tag. DeepSpeed's
own files are of flat shards, in which what belongs to a whole matrix has no place.
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
from spectral_dist.integrations.deepspeed.checkpoint_io import around_checkpoints
from spectral_dist.integrations.deepspeed.files import read_model_files
from spectral_dist.sharding import collectives

FOLDER = "spectral_dist"
"""Beside DeepSpeed's files of a tag; also the key in their client_state."""
RULE = "spectral_rule"
"""In client_state: the name of the rule."""


def keep_matrix_state(engine: Any, optimizer: SpectralOptimizer) -> None:
    """Have this engine's checkpoints say their rule, and carry its matrix state, if it has any.

    A checkpoint of another rule is refused on every rank: what it keeps would be taken for
    something else, or zeros for what it does not keep.
    """
    keeps_state = optimizer.keeps_matrix_state

    def before_save(folder: Path, *given: Any) -> dict[str, Any]:
        rule = {RULE: optimizer.rule_name}
        if not keeps_state:
            return rule
        optimizer.initialize_state()
        beside = (folder / FOLDER).absolute()
        name = checkpoint.save_matrix_state(beside, optimizer)
        return {**rule, FOLDER: {"folder": str(beside), "id": name}}

    def before_load(folder: Path, wanted: bool) -> None:
        """Look at the rule before anything has changed, where the files can be read as data."""
        with failing_together():
            if wanted and collectives.is_first():
                try:
                    client_state = read_model_files(folder, first=True)[0]
                except NotPlain:
                    return  # for what a user has put there: ``after_load`` looks again
                check_rule(str(folder), client_state.get(RULE), optimizer)

    def after_load(path: str, client_state: dict[str, Any], wanted: bool) -> None:
        rule, written = client_state.pop(RULE, None), client_state.pop(FOLDER, None)
        if not wanted:
            return
        source = None
        if isinstance(written, str):  # as older releases have written it
            written = {"folder": written, "id": None}
        with failing_together():
            check_rule(path, rule, optimizer)
            if keeps_state:
                source = _find(path, written, engine.load_universal_checkpoint())
            elif written is not None:
                raise ValueError(
                    f"{path} was saved with another optimizer than {optimizer.rule_name}, one that"
                    " keeps state of whole matrices; load it with that one, or with"
                    " load_optimizer_states=False"
                )
        if source is not None:
            optimizer.initialize_state()
            checkpoint.load_matrix_state(source, optimizer, written and written["id"])

    around_checkpoints(engine, after_load, before_save, before_load)


def _find(path: str, written: dict[str, Any] | None, universal: bool) -> Path:
    """Return where the matrix state of a checkpoint is.

    Beside DeepSpeed's files. The universal converter leaves it behind: then where those were
    converted from, or beside that.

    Raises:
        ValueError: it is not there.
    """
    tag = Path(path if os.path.isdir(path) else os.path.dirname(path))
    folders = [tag / FOLDER]
    if written is not None and universal:
        former = Path(written["folder"])
        folders += [former, tag.parent / former.parent.name / FOLDER]
    for folder in folders:
        if (folder / METADATA).is_file():
            return folder
    raise ValueError(
        f"the checkpoint {tag} has no matrix state: there is no {' or '.join(map(str, folders))}."
        f" If it is a universal one, copy the folder {FOLDER} of the tag that it was converted from"
        " into it; if it was saved with another optimizer, load it with"
        " load_optimizer_states=False"
    )
