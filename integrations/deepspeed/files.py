"""Reading the files of a DeepSpeed checkpoint as plain data, without running their pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectral_dist.checkpoint.plain import load_plain
from spectral_dist.integrations.deepspeed import _compat


def read_model_files(folder: Path, first: bool = False) -> list[dict[str, Any]]:
    """Return the content of a checkpoint's model files, client_state included.

    Tensors stay on disk until they are used.

    Args:
        folder: the checkpoint's folder, that of the tag.
        first: whether to read the first rank's file only.

    Returns:
        One dict at stages 0 to 2; one per rank, in order of ranks, at stage 3.

    Raises:
        ValueError: there is no such file, or it cannot be read; names the file.
        NotPlain: a file holds more than plain data.
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
    """Return the rank in the name of a stage-3 model file."""
    return int(file.name.removeprefix(_compat.ZERO_FILE_PREFIX).split("_")[0])
