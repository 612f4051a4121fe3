"""Checkpoints without code: what may be in one, and how it is read so that nothing in it runs.

Values are what ``torch.load(weights_only=True)`` takes; metadata is unpickled with the classes of
torch.distributed.checkpoint alone.
"""

from __future__ import annotations

import enum
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
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


class NotPlain(ValueError):
    """A file with more than plain data in it."""


def load_plain(path: Path, stand_ins: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Return what ``torch.save`` has written, without running any code in it.

    Tensors stay in the file until they are read, where its format allows that.

    Args:
        path: the file.
        stand_ins: what is made in place of classes whose names may be in it.

    Raises:
        NotPlain: there is more than plain data in it.
        ValueError: it cannot be read. Both name the file.
    """
    named: list[Any] = [(kind, name) for name, kind in (stand_ins or {}).items()]
    try:
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(named):
            return torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if unsafe := sorted(set(_unsafe(path)) - {name for _, name in named}):
            raise NotPlain(f"{path} {NOT_PLAIN}: {', '.join(unsafe)}") from None
        raise ValueError(f"{path} is damaged, or no file of torch.save: {first(error)}") from None
    except Exception as error:  # whatever junk makes of an unpickler
        raise ValueError(f"{path} is damaged, or no file of torch.save: {first(error)}") from error


def _unsafe(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []


def first(error: Exception) -> str:
    """Return the first line of an error, with its type."""
    return f"{type(error).__name__}: {error}".partition(chr(10))[0]


class Unpickler(pickle.Unpickler):
    """Reads metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class, if metadata may be made of it."""
        if (module, name) == ("builtins", "getattr"):  # by which Python below 3.11.4 pickles enums
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in CLASSES:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint of tensors needs"
            )
        return super().find_class(module, name)


def _member(kind: object, name: str) -> enum.Enum:
    """Return a member of an enum, and nothing else that ``getattr`` could."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError("it reads attributes, which no checkpoint of tensors needs")
    return kind[name]


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
        f" it out. {first(error)}"
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
