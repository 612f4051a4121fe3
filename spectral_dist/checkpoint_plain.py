"""Checkpoints without code: what may be in one, and how it is read so that nothing in it runs.

Values are what ``torch.load(weights_only=True)`` takes; metadata is unpickled with the classes of
torch.distributed.checkpoint alone.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata

NOT_PLAIN = (
    "is no plain data, which torch.load(weights_only=True) takes, and is not loaded: that would run"
    " code which is in it"
)

CLASSES = {
    *((dcp_metadata.__name__, name) for name in (*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING")),
    *((filesystem.__name__, name) for name in ("_StorageInfo", "_StoragePrefix")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((m, n) for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath")),
}
"""What metadata of torch.distributed.checkpoint is made of, beside dtypes."""


class Unpickler(pickle.Unpickler):
    """Reads metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class, if metadata may be made of it."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in CLASSES:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint of tensors needs"
            )
        return super().find_class(module, name)


def check_plain(values: Mapping[str, Any], where: str) -> None:
    """Raise for values that a load would refuse: see ``NOT_PLAIN``.

    Raises:
        ValueError: names the key, and those in it.
    """
    value: Any = values
    error = _not_plain(value)
    if error is None:
        return
    path: list[str] = []
    inner: Iterator[tuple[Any, Any, Exception]]
    while isinstance(value, Mapping):
        inner = ((k, v, e) for k, v in value.items() if (e := _not_plain(v)) is not None)
        key, value, error = next(inner, ("", None, error))
        path += [str(key)] if value is not None else []
    raise ValueError(
        f"{where}: {'.'.join(path)} is no plain data, which torch.load(weights_only=True) takes, so"
        " that it could not be loaded; make it numbers, strings, lists, dicts and tensors, or leave"
        f" it out. {str(error).partition(chr(10))[0]}"
    )


def _not_plain(value: Any) -> Exception | None:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # what pickle says of its own
        return error
    return None
