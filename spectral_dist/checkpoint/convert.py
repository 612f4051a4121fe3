"""Checkpoints from one framework's format to another's, so that a run can go on elsewhere.

Offline, in one process that holds the whole run, and without its model. The formats:

- ``dcp``: a folder of ``spectral_dist.checkpoint.save``.
- ``universal``: DeepSpeed's universal checkpoint, the folder with ``zero/`` in it, for any stage
  from 1 on. Written from nothing: what engines read of it is all here, so it needs no template.
- ``torch``: a file {"model": state_dict, "muon": that of torch.optim.Muon, "adamw": that of
  torch.optim.AdamW}, both built from named parameters, so that they know their names.
- ``dion``: a file {"model", "dion": state_dict of microsoft/dion's Muon}, named likewise.

Momentum is M <- beta M + (1 - beta) G here, under DeepSpeed as well, and in torch.optim.Muon, which
lerps: the same numbers. dion's is M <- mu M + G: ours is (1 - mu) times it, rounded once. AdamW's
moments are the same everywhere. All come out in float32 at least.

What a format has no place for is an error, but for these: torch counts no steps of matrices (theirs
are AdamW's largest); DeepSpeed and dion count the steps of a group (so of a parameter that never
had a gradient, too); fp16's loss scale starts anew. Whether a weight holds several matrices is in
none of them: give ``param_groups`` the same ``split`` again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from spectral_dist._error_help import explained
from spectral_dist.checkpoint.dcp_run import read_dcp, write_dcp
from spectral_dist.checkpoint.foreign import read_dion, read_torch, write_dion, write_torch
from spectral_dist.checkpoint.plain import first
from spectral_dist.checkpoint.run import Run
from spectral_dist.checkpoint.universal import read_universal, write_universal


@explained
def convert(from_format: str, source: str | Path, to_format: str, target: str | Path) -> Run:
    """Write a checkpoint in another format.

    Args:
        from_format, to_format: keys of ``FORMATS``.
        source: the checkpoint.
        target: what is written; it must not exist.

    Returns:
        The content of the checkpoint.

    Raises:
        ValueError: an unknown format, a checkpoint that is not whole, or one that the other format
            cannot hold: names the parameter, key or option.
    """
    for name in (from_format, to_format):
        if name not in FORMATS:
            raise ValueError(f"{name!r} is no format; known: {', '.join(FORMATS)}")
    source, target = Path(source), Path(target)
    with _told(f"{source} is no checkpoint of the format {from_format}, or not a whole one"):
        if os.path.lexists(target):
            raise ValueError(f"{target} exists already; give another name")
        if not source.exists():
            raise ValueError(f"there is no {source}")
        run = FORMATS[from_format][0](source).check(source)
    try:
        with _told(f"{target} was not written"):
            FORMATS[to_format][1](target, run)
    except BaseException:  # a part of a checkpoint is none, and would be in the way of the next try
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                target.unlink()
        raise
    return run


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn any error inside into a ValueError: junk in a file can make the code raise anything."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {first(error)}") from error


FORMATS: dict[str, tuple[Callable[[Path], Run], Callable[[Path, Run], None]]] = {
    "dcp": (read_dcp, write_dcp),
    "universal": (read_universal, write_universal),
    "torch": (read_torch, write_torch),
    "dion": (read_dion, write_dion),
}
"""The reader and the writer of each format, by its name."""
