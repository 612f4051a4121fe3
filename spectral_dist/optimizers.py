"""The optimizers that users name, each made of a registered rule; types are in optimizers.pyi."""

from __future__ import annotations

from typing import Any

from spectral_dist.core.named import class_of
from spectral_dist.rules import registry

__all__ = [entry.title for entry in registry.builtin_entries()]


def __getattr__(name: str) -> Any:
    for entry in registry.entries():
        if entry.title == name and entry.rule is not None:
            return class_of(entry)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
