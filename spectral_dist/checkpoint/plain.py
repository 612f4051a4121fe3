"""Checkpoints without code: what may be in one, and how to read it so that nothing in it runs.

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
"""(module, name) of the classes in metadata of torch.distributed.checkpoint; dtypes are allowed
as well."""


class NotPlain(ValueError):
    """The error for a file with more than plain data in it."""


def load_plain(path: Path, stand_ins: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Return what ``torch.save`` has written, without running any code in it.

    Tensors stay in the file until they are read, where its format allows that.

    Args:
        path: the file.
        stand_ins: callables that take the place of classes, by the names that the file may have.

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
    except Exception as error:  # junk can make an unpickler raise anything
        raise ValueError(f"{path} is damaged, or no file of torch.save: {first(error)}") from error


def _unsafe(path: Path) -> list[str]:
    """Return the names of classes in a file that torch would not load, if they can be told."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []


def first(error: Exception) -> str:
    """Return the first line of an error, with its type."""
    return f"{type(error).__name__}: {error}".partition(chr(10))[0]


class Unpickler(pickle.Unpickler):
    """An unpickler of metadata, which makes objects of ``CLASSES`` and dtypes only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or dtype that metadata may have; raise an UnpicklingError for others."""
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
    """Check that values are plain data, which a load accepts.

    Args:
        values: nested dicts.
        where: they come from, for the error.

    Raises:
        ValueError: names the path of keys to the first value that is not.
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
    """Return the error of saving a value and loading it as plain data; None if that works."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle's own errors are of many types
        return error
    return None
