"""``axolotl preprocess`` and ``axolotl train`` on CPUs: torchrun starts the latter.

Args: "preprocess" or "train" and the YAML, and where each rank's records go; or "check" and a file
of configs, of each of which it prints what ``spectral`` is in the end, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support import recorded


def on_cpu() -> None:
    """Load models, and make meshes, on the CPU, of which Axolotl does not think."""
    from torch.distributed import device_mesh
    from transformers.models.auto import auto_factory

    make: Any = device_mesh.init_device_mesh
    device_mesh.init_device_mesh = lambda kind, *args, **kwargs: make("cpu", *args, **kwargs)
    load = auto_factory._BaseAutoModelClass.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return load(cls, *args, **{**kwargs, "device_map": None})

    auto_factory._BaseAutoModelClass.from_pretrained = classmethod(from_pretrained)


def check(path: str) -> None:
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    said = {}
    for name, config in json.loads(Path(path).read_text()).items():
        try:
            prepare_plugins(DictDefault(config))
            said[name] = validate_config(DictDefault(config)).spectral.to_dict()
        except ValueError as error:
            said[name] = str(error)
    Path(f"{path}.said").write_text(json.dumps(said))


def main(command: str, path: str, records: str = "") -> None:
    if command == "check":
        check(path)
    elif command == "preprocess":
        from axolotl.cli.preprocess import do_cli

        do_cli(path)
    else:
        on_cpu()
        recorded.record(Path(f"{records}{os.environ['RANK']}.pt"))
        from axolotl.cli.train import do_cli as train

        with fresh("fsdp_config" in Path(path).read_text()):
            train(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
