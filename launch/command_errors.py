"""How the command line says what is wrong."""

from __future__ import annotations

from rich.console import Console

from spectral_dist._error_help import with_page


def print_error(command: str, error: ValueError) -> None:
    """Print what is wrong in one line, and where the docs say more."""
    text = " ".join(f"spectral-dist {command}: {with_page(str(error))}".split())
    Console(stderr=True).print(text, style="red", markup=False, soft_wrap=True)
