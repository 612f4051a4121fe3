"""Megatron-Bridge on a CPU: what it imports of packages for GPUs is given by empty classes.

Everything of Bridge's and of Megatron's that the tests call is their own. Bridge's training loop
asks for CUDA itself and is not run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

import typing_extensions
from torch import nn

from tests.support import megatron_cpu

VERSION = megatron_cpu.VERSIONS[0]
ABSENT = ("transformer_engine", "modelopt", "megatron.energon")
"""Packages for GPUs, of which Bridge needs the names of classes."""
BEFORE = ("extensions", "models.gpt", "optimizer", "transformer", "distributed", "inference")
"""Modules of megatron.core that look for those packages and do without them."""


class AnyClass(type):
    """A class that has every attribute: further classes like it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return AnyClass(name, (nn.Module,), {})


class Package(types.ModuleType):
    """A package that has every class."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyClass(name, (nn.Module,), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``ABSENT``, and all that is below."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(f"{fullname}.".startswith(f"{name}.") for name in ABSENT):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Package(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Make ``import megatron.bridge.training.optim`` work in this process; again: nothing."""
    megatron_cpu.install(VERSION)
    if not hasattr(typing, "override"):  # Python 3.11 has none
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        for name in BEFORE:
            importlib.import_module(f"megatron.core.{name}")
        sys.meta_path.append(Finder())
