"""What can compute AdamW: the option ``scalar_backend``."""

from __future__ import annotations

from collections.abc import Callable

from spectral_dist.rules import adamw
from spectral_dist.rules.adamw import Update


def _apex() -> Update:
    from spectral_dist.rules.adamw_apex import FusedAdamW

    return FusedAdamW()


BACKENDS: dict[str, Callable[[], Update]] = {"torch": lambda: adamw.update, "apex": _apex}
"""Each by name, and how to get it; all have the signature of ``adamw.update``."""
