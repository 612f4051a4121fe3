"""``python -m spectral_dist.integrations.llama_factory`` on CPUs: torchrun starts it.

Args: where each rank's records go, and LLaMA-Factory's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

from tests.support import recorded


def on_cpu() -> None:
    """Load checkpoints on the CPU, which accelerate 1.11 calls cpu:0; torch knows no such place."""
    load = torch.load
    torch.load = lambda file, map_location=None, *args, **kwargs: load(file, "cpu", *args, **kwargs)


def main(records: str, *words: str) -> None:
    on_cpu()
    recorded.record(Path(f"{records}{os.environ['RANK']}.pt"))
    sys.argv = ["llama_factory", *words]
    runpy.run_module("spectral_dist.integrations.llama_factory", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
