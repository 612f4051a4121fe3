"""Start the command `spectral-dist`, or say what has to be installed for it."""

from __future__ import annotations

import sys

NEEDED = ("typer", "rich", "transformers", "tokenizers", "yaml")
"""What the command's modules import beyond torch: the extras "cli" and "train"."""


def main() -> None:
    """Run the command line in ``cli.py``."""
    try:
        from spectral_dist.launch.cli import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        extra = "cli" if error.name in NEEDED[:2] else "train"
        sys.exit(f"spectral-dist needs {error.name}: pip install 'spectral-dist[{extra}]'")
