"""The backends that can compute AdamW: values of the option ``scalar_backend``."""

from __future__ import annotations

from collections.abc import Callable

from spectral_dist.rules import adamw
from spectral_dist.rules.adamw import Update


def _apex() -> Update:
    """Build the backend of NVIDIA's apex.

    Raises:
        ValueError: apex cannot be used.
    """
    from spectral_dist.rules.adamw_apex import FusedAdamW

    return FusedAdamW()


BACKENDS: dict[str, Callable[[], Update]] = {"torch": lambda: adamw.update, "apex": _apex}
"""A function that builds each backend, by name; all backends have ``adamw.update``'s signature."""
