"""The folder of a run: one process writes it at a time, and it says how the run begins."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from enum import StrEnum
from pathlib import Path
from typing import IO

from spectral_dist.launch import checkpoints, files
from spectral_dist.launch.checkpoints import Checkpoint

LOCK = "run.lock"
SUMMARY = "summary.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PATIENCE = 5.0
"""Seconds to wait for a run that is ending, as one that is requeued elsewhere."""


class Resume(StrEnum):
    """Whether a run goes on from a checkpoint."""

    never = "never"
    must = "must"
    auto = "auto"


class RunFolder:
    """`--out`, as rank 0 sees it."""

    def __init__(self, out: Path, resume: Resume) -> None:
        self.out, self.resume = out, resume
        self.checkpoints = out / "checkpoints"
        self._lock: IO[str] | None = None

    def open(self) -> tuple[Checkpoint | None, list[str]]:
        """Take the folder, and decide where to begin; on rank 0.

        Returns:
            The checkpoint to go on from (None: begin), and what to tell about it.

        Raises:
            ValueError: another run is in the folder now, it holds one and is not to be resumed, or
                there is nothing to resume.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            notes = self._take()
            for folder in (self.out, self.checkpoints):
                files.remove_partial_files(folder)
        except OSError as error:
            raise ValueError(
                f"cannot write to --out {self.out}: {error.strerror or error}; pass another --out"
            ) from None
        begun = (self.out / "metrics.jsonl", self.checkpoints / checkpoints.LATEST)
        holds = any(p.exists() for p in begun) or bool(checkpoints.steps(self.checkpoints))
        if self.resume is Resume.never and holds:
            raise ValueError(f"{self.out} holds a run: pass --resume or another --out")
        checkpoint, damage = checkpoints.find(self.checkpoints)
        if checkpoint is None and self.resume is Resume.must:
            raise ValueError(
                f"no checkpoint to resume in {self.checkpoints}; --resume auto would start anew"
            )
        if checkpoint is not None:
            if damage:  # so that `latest` is of a whole one again
                checkpoints.name_latest(checkpoint.folder)
            notes += [*damage, f"goes on from {checkpoint.folder}"]
        elif holds:
            notes += damage
            notes.append(f"{self.out} holds a run that ended before its first checkpoint: anew")
        (self.out / SUMMARY).unlink(missing_ok=True)  # of a run that is done
        return checkpoint, notes

    def _take(self) -> list[str]:
        """Lock a file in the folder, which is free again when this process is no more.

        Returns:
            What there is to say about it: a file system may have no locks.
        """
        # One that was there is neither emptied, since it tells whose it is, nor followed if a link.
        descriptor = os.open(self.out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._lock = os.fdopen(descriptor, "r+", encoding="utf-8")
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    holder = self._lock.read(200).strip() or "another process"
                    raise ValueError(
                        f"{self.out} is the folder of a run that goes on now ({holder}): wait for"
                        " it to end, or pass another --out"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return [f"{self.out} is where there are no locks: see that one run alone uses it"]
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return []

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
