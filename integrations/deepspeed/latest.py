"""DeepSpeed's file `latest`, which names the checkpoint to load, made to name complete ones only.

DeepSpeed's rank 0 writes the file as soon as its own files are written, and only then waits for the
other ranks: a job that is killed in between leaves `latest` naming an incomplete checkpoint.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from spectral_dist.checkpoint.files import failing_together, replace
from spectral_dist.sharding import collectives

LATEST = "latest"


def guard_latest(engine: Any) -> None:
    """Make this engine write `latest` after every rank has written its files, and atomically.

    While the checkpoint that `latest` names is overwritten, there is no such file. An engine that
    writes in the background ("decoupled") is left to write the file by itself, later.
    """
    save = engine.save_checkpoint
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if engine.checkpoint_engine.is_decoupled():
            return save(*args, **kwargs)
        values = call.arguments
        tag = str(f"global_step{engine.global_steps}" if values["tag"] is None else values["tag"])
        path = Path(values["save_dir"] or ".", LATEST)
        was_named = False
        with failing_together():
            if collectives.is_first() and path.is_file() and _text(path) == tag:
                path.unlink()
                was_named = True
        save_latest, values["save_latest"] = values["save_latest"], False
        result = save(*call.args, **call.kwargs)
        with failing_together():  # waits until all ranks have written their files
            pass
        with failing_together():
            if collectives.is_first() and (save_latest or was_named):
                replace(path, tag)
        return result

    engine.save_checkpoint = save_checkpoint


def read(folder: str, universal: bool) -> str | None:
    """Return the tag that `latest` names, or None if there is no such file. A collective call.

    Args:
        folder: the folder of all checkpoints, in which the file is.
        universal: whether to read `latest_universal` in its place.

    Raises:
        ValueError: on every rank, if the file names no checkpoint in the folder.
    """
    path = Path(folder, f"{LATEST}_universal" if universal else LATEST)
    tag = None
    with failing_together():
        if path.is_file():
            tag = _text(path)
            parts = Path(tag).parts
            is_inside = parts and not Path(tag).is_absolute() and ".." not in parts
            if not is_inside or not Path(folder, tag).is_dir():
                raise ValueError(
                    f"{path} names {tag[:100]!r}, which is no checkpoint in {folder}; write the"
                    " name of one that is complete into it, or give load_checkpoint its tag"
                )
    return tag


def _text(path: Path) -> str:
    """Return the tag in a file `latest`."""
    return path.read_text(encoding="utf-8", errors="replace").strip()
