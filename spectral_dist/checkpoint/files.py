"""The files of a checkpoint: written with their hashes, checked and read as plain data.

Beside the files of torch.distributed.checkpoint lies ``MANIFEST``, which is written last and at
once: without it a save is not complete. It has the size and sha256 of every file. A rank hashes
what it writes while it writes it, so that a save reads nothing back, and sends the hashes along
with what the ranks gather anyway. Before a load, every file is hashed by one of the ranks, each of
which hashes a share of them. So the files are read twice, the second time mostly out of the page
cache; to load into separate tensors first, and check those, would take the memory of the model and
its states twice, on every rank. The folder must be one that all ranks see.

Nothing here runs code that is in a file: see ``checkpoint.plain``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from spectral_dist.checkpoint.plain import NOT_PLAIN, Unpickler
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group

MANIFEST = "spectral_dist.json"
METADATA = ".metadata"
Files = dict[str, dict[str, Any]]
"""{name: {"bytes": its size, "sha256": in hexadecimal}}"""


# -- writing


class _Hashed:
    """A stream that is written from start to end, and hashed while it is."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes
        return self._stream.write(data)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Disk(FileSystem):
    """The file system, which hashes the files that are written and names the file in errors."""

    def __init__(self) -> None:
        self.files: Files = {}

    @contextlib.contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        try:
            with Path(path).open(mode) as stream:
                if "w" not in mode:
                    yield cast(io.IOBase, stream)
                    return
                hashed = _Hashed(stream)
                yield cast(io.IOBase, hashed)
                self.files[Path(path).name] = hashed.entry()
        except Exception as error:
            what = "cannot be written" if "w" in mode else "cannot be read"
            raise ValueError(f"{path} {what}: {type(error).__name__}: {error}") from error


class Writer(FileSystemWriter):
    """A writer of a checkpoint's files, and of the manifest when all ranks have written theirs."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.fs = self._disk = _Disk()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Remove the manifest of an earlier checkpoint in the folder, before any rank writes."""
        if self.rank == 0 or self.rank is None:
            Path(self.path, MANIFEST).unlink(missing_ok=True)
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; return the results and one more for the hash of each file."""
        written = super().write_data(plan, planner).value()
        hashes = [
            WriteResult(MetadataIndex(name), entry["bytes"], entry["sha256"])
            for name, entry in self._disk.files.items()
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result([*written, *hashes])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, then the manifest; called on one rank.

        Args:
            metadata: of the checkpoint.
            results: of ``write_data``, of every rank.
        """
        metadata.manifest = MANIFEST  # type: ignore[attr-defined]
        files: Files = {}
        for result in (result for of_rank in results for result in of_rank):
            if isinstance(result.storage_data, str):
                files[result.index.fqn] = {
                    "bytes": result.size_in_bytes,
                    "sha256": result.storage_data,
                }
        plain = [[r for r in of_rank if not isinstance(r.storage_data, str)] for of_rank in results]
        super().finish(metadata, plain)
        files[METADATA] = self._disk.files.pop(f"{METADATA}.tmp")
        content = {"files": files, "sha256": _digest(files)}
        replace(Path(self.path, MANIFEST), json.dumps(content, indent=1))


def _digest(files: Files) -> str:
    """Return the sha256 of a list of files, which the manifest has of itself."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def replace(path: Path, text: str) -> None:
    """Write a small text file atomically: a crash leaves the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write(folder: str | Path, content: Mapping[str, Any], *, single_process: bool = False) -> str:
    """Write a checkpoint, and return its id, the same on every rank; a collective call.

    Args:
        folder: what is in it is overwritten.
        content: nested dicts of tensors and plain values.
        alone: whether this process writes all of it, and no other takes part.

    Raises:
        RuntimeError: on every rank, if one of them could not write: names the file.
    """
    with _no_dist_warning_suppressed():
        return write_in(None, folder, content, single_process)


def write_in(
    group: Group, folder: str | Path, content: Mapping[str, Any], single_process: bool = False
) -> str:
    """Write a checkpoint as ``write`` does, by collectives of a group; None: the job's."""
    with _told(f"{folder} was not saved", RuntimeError):
        saved = dcp_save(
            dict(content),
            storage_writer=Writer(folder),
            process_group=group,
            no_dist=single_process,
        )
    return save_id(saved)


def save_id(metadata: Metadata) -> str:
    """Return the id of a save, which differs from that of every other save."""
    return str(metadata.storage_meta.save_id if metadata.storage_meta else None)


# -- checking


def verify(folder: str | Path, *, single_process: bool = False) -> bool:
    """Check that a checkpoint's files are there and are what was written; a collective call.

    Args:
        folder: of the checkpoint.
        single_process: whether this process checks all files, and no other takes part.

    Returns:
        Whether hashes were compared: checkpoints of older releases have none.

    Raises:
        ValueError: on every rank; names the file.
    """
    rank, ranks = (0, 1) if single_process else (collectives.job_rank(), collectives.job_size())
    with failing_together(single_process):
        if not Path(folder, METADATA).is_file():
            raise ValueError(f"{folder} holds no checkpoint: there is no {METADATA} in it")
        if not Path(folder, MANIFEST).is_file():
            # metadata is read only without a manifest: it may be damaged, or of another save
            if hasattr(read_metadata(folder), "manifest"):
                raise ValueError(
                    f"{folder} is not complete: there is no {MANIFEST} in it, which is written"
                    " last. Its save was interrupted, or it was copied in part: take another one"
                )
            return False
        files = _manifest(Path(folder, MANIFEST))
        # if there are as many ranks as at the save, each hashes the files that it is likely to read
        names = sorted(files, key=lambda name: [(len(part), part) for part in name.split("_")])
        for name in {METADATA, *names[rank::ranks]}:
            _check_file(Path(folder, name), files[name])
    return True


def _manifest(path: Path) -> Files:
    """Return the files that a manifest lists; raise a ValueError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files: Files = content["files"]
        if content["sha256"] != _digest(files):
            raise ValueError("its own sha256 is another one")
        if METADATA not in files or not all(map(is_name, files)):
            raise ValueError("it does not list the files of this folder")
        return files
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}, the list of the checkpoint's files, is damaged: {error}"
        ) from error


def is_name(text: str) -> bool:
    """Return whether a text is a plain file name, which cannot point out of its folder."""
    return Path(text).name == text and text not in ("", "..")


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise a ValueError if a file has not the size and hash of its entry in the manifest."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                raise ValueError(f"{path} has {size} bytes in place of {entry['bytes']}{DAMAGED}")
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(
                    f"{path} is not what was saved: its sha256 is another one{DAMAGED}"
                )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}{DAMAGED}") from error


DAMAGED = ". Nothing was loaded; take another checkpoint, or another copy of this one"


# -- reading


class Reader(FileSystemReader):
    """A reader of a checkpoint's files that runs no code in them."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.fs = _Disk()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the checkpoint: what is in it, and in which files."""
        path = Path(self.path, METADATA)
        with self.fs.create_stream(path, "rb") as file:
            metadata = Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise ValueError("it is not the metadata of torch.distributed.checkpoint")
            for info in (metadata.storage_data or {}).values():
                if not is_name(info.relative_path):
                    raise ValueError(f"it names {info.relative_path}, out of its folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: str | Path) -> Metadata:
    """Return the metadata of a checkpoint.

    Raises:
        ValueError: it cannot be read, or is none: names the file.
    """
    return Reader(folder).read_metadata()


class _Planner(DefaultLoadPlanner):
    """A planner that loads tensors in place and replaces other values, if they are plain data.

    Args:
        folder: of the checkpoint, for errors.
        flat: whether nested dicts and sharded tensors are flattened, as when they were saved.
        rehearsal: whether to read everything and change nothing.
    """

    def __init__(self, folder: str | Path, flat: bool, rehearsal: bool) -> None:
        super().__init__(flatten_state_dict=flat, flatten_sharded_tensors=flat)
        self.folder, self.rehearsal = folder, rehearsal

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is no tensor; raise a ValueError if it is no plain data."""
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            name = read_item.dest_index.fqn
            raise ValueError(f"{name} in {self.folder} {NOT_PLAIN}: {error}") from None
        value.seek(0)
        if not self.rehearsal:
            super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the tensor into which values are read; on the meta device in a rehearsal."""
        target: Tensor = super().resolve_tensor(read_item)
        return torch.empty_like(target, device="meta") if self.rehearsal else target


def read(
    folder: str | Path, content: dict[str, Any], *, flat: bool = True, rehearse: bool = False
) -> None:
    """Fill ``content`` from a checkpoint; a collective call, unless ``flat`` is False.

    Args:
        folder: of the checkpoint.
        content: nested dicts with tensors, which are written in place, and other values, which are
            replaced.
        flat: False: ``content`` has the keys of the metadata, and this process reads by itself.
        rehearse: whether to read everything and change nothing, so that errors come first.

    Raises:
        ValueError: on every rank, if one of them could not read what it needs: names the file.
    """
    planner: LoadPlanner = _Planner(folder, flat, rehearse)
    with _no_dist_warning_suppressed(), _told(f"{folder} was not loaded", ValueError):
        dcp_load(content, storage_reader=Reader(folder), planner=planner, no_dist=not flat)


# -- errors


@contextlib.contextmanager
def failing_together(single_process: bool = False) -> Iterator[None]:
    """Raise on every rank of the job what any of them raises inside; a collective context.

    Inside of it no rank may wait for another one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    collectives.raise_together(error, [] if single_process else [collectives.world()])


@contextlib.contextmanager
def _told(what: str, kind: Callable[[str], Exception]) -> Iterator[None]:
    """Turn torch's CheckpointException, a BaseException full of tracebacks, into a short error.

    Args:
        what: the beginning of the message.
        kind: the error's type.
    """
    try:
        yield
    except CheckpointException as raised:
        _tell(what, kind, raised)


def _tell(what: str, kind: Callable[[str], Exception], raised: CheckpointException) -> NoReturn:
    """Raise an error of ``kind`` with the message of the first rank that failed."""
    rank, (error, _) = min(raised.failures.items())
    on_rank = f" (on rank {rank} of {collectives.job_size()})" if collectives.job_size() > 1 else ""
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    raise kind(f"{what}: {reason}{on_rank}") from raised


@contextlib.contextmanager
def _no_dist_warning_suppressed() -> Iterator[None]:
    """Suppress torch's warning that one process saves and loads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield
