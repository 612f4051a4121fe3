"""Functions that are called when a module of a framework has been imported, and not before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast


class _AfterImport(MetaPathFinder):
    """A finder on ``sys.meta_path`` that calls a function with one module after its import."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return another finder's spec of the module, with a loader that calls the function."""
        if name != self.name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: Any = find(name, path, target) if find else None
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = self._then_call(spec.loader.exec_module)
                return cast(ModuleSpec, spec)
        return None

    def _then_call(self, load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        """Return a function that loads a module, and calls ours with it."""

        def load_and_call(module: ModuleType) -> None:
            load(module)
            self.then(module)

        return load_and_call


def after_import(name: str, then: Callable[[Any], None]) -> None:
    """Call a function with a module: now if it is imported already, and after each later import.

    Args:
        name: of the module. If it is not installed, nothing happens.
        then: called each time that the module is loaded.
    """
    module = sys.modules.get(name)
    if module is not None:
        then(module)
    sys.meta_path.insert(0, _AfterImport(name, then))
