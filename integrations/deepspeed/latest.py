"""DeepSpeed's file `latest`, which names the checkpoint to load: always one that is complete.

DeepSpeed's rank 0 writes it when its own files are written, and only then waits for the others.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from spectral_dist.checkpoint.files import failing_together, replace
from spectral_dist.sharding import collectives

LATEST = "latest"


def keep_latest(engine: Any) -> None:
    """Have this engine write `latest` when every rank has written its files, and at once.

    While a checkpoint that it names is overwritten, there is none. An engine that writes in the
    background ("decoupled") is left to do it in its own way, later.
    """
    save = engine.save_checkpoint
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if engine.checkpoint_engine.is_decoupled():
            return save(*args, **kwargs)
        given = call.arguments
        tag = str(f"global_step{engine.global_steps}" if given["tag"] is None else given["tag"])
        path = Path(given["save_dir"] or ".", LATEST)
        named = False
        with failing_together():
            if collectives.is_first() and path.is_file() and _text(path) == tag:
                path.unlink()
                named = True
        wanted, given["save_latest"] = given["save_latest"], False
        result = save(*call.args, **call.kwargs)
        with failing_together():  # which is when all ranks have written their files
            pass
        with failing_together():
            if collectives.is_first() and (wanted or named):
                replace(path, tag)
        return result

    engine.save_checkpoint = save_checkpoint


def read(folder: str, universal: bool) -> str | None:
    """Return the tag to load, None if there is no file that names it. A collective call.

    Raises:
        ValueError: on every rank, if the file names no checkpoint beside it.
    """
    path = Path(folder, f"{LATEST}_universal" if universal else LATEST)
    tag = None
    with failing_together():
        if path.is_file():
            tag = _text(path)
            inside = Path(tag).parts and not Path(tag).is_absolute() and ".." not in Path(tag).parts
            if not inside or not Path(folder, tag).is_dir():
                raise ValueError(
                    f"{path} names {tag[:100]!r}, which is no checkpoint in {folder}; write the"
                    " name of one that is complete into it, or give load_checkpoint its tag"
                )
    return tag


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
