"""DeepSpeed's files of a checkpoint, read as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_dist.checkpoint.plain import load_plain
from spectral_dist.integrations.deepspeed import _compat


def read_model_files(folder: Path, first: bool = False) -> list[dict[str, Any]]:
    """Return what is in the engines' files of models, client_state too; tensors stay on disk.

    Args:
        folder: of the checkpoint.
        first: only that of the first rank.

    Returns:
        One of stages 0 to 2, one for each rank of stage 3.

    Raises:
        ValueError: there is none, or it cannot be read: names the file.
        NotPlain: there is more than plain data in it.
    """
    ending = f"*{_compat.MODEL_FILE_SUFFIX}"
    of_ranks = sorted(folder.glob(_compat.ZERO_FILE_PREFIX + ending), key=_rank)
    paths = of_ranks or sorted(folder.glob(_compat.MODEL_FILE_PREFIX + ending))
    if not paths:
        raise ValueError(
            f"{folder} holds no checkpoint of DeepSpeed: there is no"
            f" {_compat.MODEL_FILE_PREFIX}{ending} in it"
        )
    return [load_plain(path) for path in (paths[:1] if first else paths)]


def _rank(file: Path) -> int:
    return int(file.name.removeprefix(_compat.ZERO_FILE_PREFIX).split("_")[0])
