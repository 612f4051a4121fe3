"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from spectral_dist._error_help import explained
from spectral_dist.checkpoint import files
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group


class Background:
    """A thread that writes checkpoints, with a process group that nothing else uses."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str] | None = None
        self._groups: tuple[Group, Group] = (None, None)

    def write(self, folder: str | Path, content: Mapping[str, Any]) -> Future[str]:
        """Copy a checkpoint's content to the host, and write it in the thread; a collective call.

        It first waits for the write before this one, so that there is one copy at a time. A process
        that ends waits for its last write.

        Args:
            folder: what is in it is overwritten.
            content: as in ``checkpoint.files.write``.

        Returns:
            A future of what ``checkpoint.files.write`` returns or raises.
        """
        if self._pending is not None:
            wait([self._pending])
        group = self._group()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied = stager.stage(dict(content))
        assert isinstance(copied, dict)
        stager.close()
        self._pending = self._thread.submit(explained(files.write_in), group, folder, copied)
        return self._pending

    def _group(self) -> Group:
        """Return the thread's group of all ranks of the job; a collective call the first time."""
        world = collectives.world()
        if world is not self._groups[0]:
            self._groups = (world, collectives.host_group() if world is not None else None)
        return self._groups[1]


BACKGROUND = Background()
