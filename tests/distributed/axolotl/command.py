"""``axolotl preprocess`` and ``axolotl train`` on CPUs: torchrun starts the latter.

Args: "preprocess" or "train", the YAML, and where each rank's records go.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support import recorded


def on_cpu() -> None:
    """Load models on the CPU, for which Axolotl has no device_map that transformers takes."""
    from transformers.models.auto import auto_factory

    load = auto_factory._BaseAutoModelClass.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return load(cls, *args, **{**kwargs, "device_map": None})

    auto_factory._BaseAutoModelClass.from_pretrained = classmethod(from_pretrained)


def main(command: str, path: str, records: str = "") -> None:
    if command == "preprocess":
        from axolotl.cli.preprocess import do_cli

        do_cli(path)
        return
    on_cpu()
    recorded.record(Path(f"{records}{os.environ['RANK']}.pt"))
    from axolotl.cli.train import do_cli as train

    with fresh("fsdp_config" in Path(path).read_text()):
        train(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
