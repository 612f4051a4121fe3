"""What a file must not make anybody do who reads it."""

from __future__ import annotations

from typing import Any


class PickledCode:
    """Prints "run" when a pickle of it is loaded."""

    def __reduce__(self) -> Any:
        return print, ("run",)
