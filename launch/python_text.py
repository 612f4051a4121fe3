"""The Python source that every installation has, for `--data code`: another one on each."""

from __future__ import annotations

import os
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from spectral_dist.launch.text_files import Source, digest

PYTHON_BYTES = 48 << 20  # of all: tokenizing it all would make a first run wait
PYTHON_FILE_BYTES = 200_000  # above it are mostly generated tables
PYTHON_SKIPPED = {"site-packages", "dist-packages", "encodings"}  # not the standard library; tables


def sources() -> list[Source]:
    """Return a fixed sample of PYTHON_BYTES of the .py files of the standard library and torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ValueError("--data code needs an installed torch: give text of your own")
    roots = {"python": Path(sysconfig.get_path("stdlib")), "torch": Path(spec.origin).parent}
    all_sources = []
    for label, root in roots.items():
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in PYTHON_SKIPPED]
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                size = path.stat().st_size
                if 0 < size <= PYTHON_FILE_BYTES:
                    name = f"{label}/{path.relative_to(root).as_posix()}"
                    all_sources.append(Source(name, path, size))
    # The order of a hash mixes both trees, and cutting it off leaves a fair sample of both.
    all_sources.sort(key=lambda source: digest("order", source.name))
    sample, total = [], 0
    for source in all_sources:
        total += source.size
        if total > PYTHON_BYTES:
            break
        sample.append(source)
    if not sample:
        raise ValueError(f"no Python source under {', '.join(map(str, roots.values()))}")
    return sample
