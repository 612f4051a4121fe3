"""Open the folder of a run for one process at a time, and decide where the run begins."""

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
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCK_TIMEOUT = 5.0
"""Seconds to wait for the lock: a run that was requeued may still be ending on another node."""


class Resume(StrEnum):
    """Whether a run begins anew, must resume from a checkpoint, or does so if there is one."""

    never = "never"
    must = "must"
    auto = "auto"


class RunFolder:
    """The folder `--out`, which rank 0 opens.

    Attributes:
        out: the folder.
        resume: whether to resume.
        checkpoints: the folder in it that holds the checkpoints.
    """

    def __init__(self, out: Path, resume: Resume) -> None:
        self.out, self.resume = out, resume
        self.checkpoints = out / "checkpoints"
        self._lock: IO[str] | None = None

    def open(self) -> tuple[Checkpoint | None, list[str]]:
        """Lock the folder, and decide where to begin; rank 0 calls this.

        Returns:
            The checkpoint to resume from (None: begin at step 0), and messages about it.

        Raises:
            ValueError: another run is using the folder, it holds a run and ``resume`` is never, or
                there is nothing to resume.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            notes = self._lock_folder()
            for folder in (self.out, self.checkpoints):
                files.remove_partial_files(folder)
        except OSError as error:
            raise ValueError(
                f"cannot write to --out {self.out}: {error.strerror or error}; pass another --out"
            ) from None
        traces_of_run = (self.out / "metrics.jsonl", self.checkpoints / checkpoints.LATEST)
        holds_run = any(p.exists() for p in traces_of_run) or bool(
            checkpoints.steps(self.checkpoints)
        )
        if self.resume is Resume.never and holds_run:
            raise ValueError(f"{self.out} holds a run: pass --resume or another --out")
        checkpoint, damage = checkpoints.find(self.checkpoints)
        if checkpoint is None and self.resume is Resume.must:
            raise ValueError(
                f"no checkpoint to resume in {self.checkpoints}; --resume auto would start anew"
            )
        if checkpoint is not None:
            if damage:  # `latest` names it from now on
                checkpoints.name_latest(checkpoint.folder)
            notes += [*damage, f"goes on from {checkpoint.folder}"]
        elif holds_run:
            notes += damage
            notes.append(f"{self.out} holds a run that ended before its first checkpoint: anew")
        (self.out / SUMMARY).unlink(missing_ok=True)  # of the earlier run
        return checkpoint, notes

    def _lock_folder(self) -> list[str]:
        """Lock a file in the folder; the lock ends with this process.

        Returns:
            A message if the file system has no locks.
        """
        # An existing file is not emptied, since it names its holder, and a link is not followed.
        descriptor = os.open(self.out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._lock = os.fdopen(descriptor, "r+", encoding="utf-8")
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = self._lock.read(200).strip() or "another process"
                    raise ValueError(
                        f"{self.out} is the folder of a run that goes on now ({holder}): wait for"
                        " it to end, or pass another --out"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in LOCKS_UNSUPPORTED:
                    raise
                return [f"{self.out} is where there are no locks: see that one run alone uses it"]
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return []

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
