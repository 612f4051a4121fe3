"""Save the checkpoints of a pretraining run, and find and load the one to resume from.

Each checkpoint is a folder with a manifest, which is written last; the file `latest` names the
newest complete one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException

from spectral_dist.launch import files
from spectral_dist.launch.ranks import Ranks

if TYPE_CHECKING:
    from spectral_dist.launch.engines.base import Engine

State = dict[str, Any]
MANIFEST = "manifest.json"
LATEST = "latest"
STEP = re.compile(r"step_(\d+)")
FORMAT = 1


class DamagedCheckpoint(Exception):
    """A checkpoint is incomplete or has changed; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: where its files are.
        run: the step, totals and settings that it was saved with.
        files: bytes and SHA-256 of each file, by name.
    """

    folder: Path
    run: State
    files: Mapping[str, tuple[int, str]]


def save(engine: Engine, ranks: Ranks, folder: Path, run: State, keep: int = 0) -> Path:
    """Write a checkpoint of step ``run["step"]`` and let `latest` name it; all ranks call this.

    The ranks divide the files among them to hash and sync them to disk. The manifest and `latest`
    follow when all files are there.

    Args:
        engine: the model and optimizer to save.
        ranks: all ranks of the job.
        folder: holds all checkpoints of the run.
        run: the step and totals to resume with, and the settings that must then be the same; JSON.
        keep: how many checkpoints to keep, those of the highest steps up to this one; 0: all.

    Returns:
        The folder of the new checkpoint.

    Raises:
        ValueError: on every rank: a file of the checkpoint cannot be read again.
        OSError: a rank cannot write its part, for example because the disk is full.
    """
    target = folder / f"step_{run['step']:06d}"
    ranks.on_first(lambda: _clear(target))
    _write(engine, target)
    # This gathers from all ranks, and so is the barrier after which no file is written.
    names = ranks.on_first(
        lambda: sorted(files.sizes_below(target).items(), key=lambda item: -item[1])
    )
    names_of_rank = [name for name, _ in names[ranks.rank :: ranks.world]]
    digests: dict[str, str] = {}
    for digests_of_rank in ranks.together(lambda: _hash(target, names_of_rank)):
        digests |= digests_of_rank
    content = {name: [size, digests[name]] for name, size in sorted(names)}
    ranks.on_first(lambda: _write_manifest(target, run, content, keep))
    return target


def _clear(target: Path) -> None:
    """Remove what an earlier run left of this step, and create the empty folder."""
    if target.exists():
        remove(target)
    target.mkdir(parents=True)


def _write(engine: Engine, target: Path) -> None:
    """Have the engine write its files, and name the reason if the disk is full.

    torch may say no more of a full disk than "unexpected pos 704 vs 598".
    """
    try:
        engine.write(target)
    except (Exception, CheckpointException) as error:
        try:
            files.check_writable(target)
        except OSError as reason:
            what = f"{reason.strerror}: this checkpoint is not whole, go on from one before it"
            raise OSError(reason.errno, what, str(target)) from error
        raise


def _hash(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each named file, which is synced to disk."""
    return dict(zip(names, files.hashes([folder / n for n in names], sync=True), strict=True))


def _write_manifest(target: Path, run: State, content: Mapping[str, Any], keep: int) -> None:
    """Write the manifest and `latest`, then remove checkpoints beyond the ``keep`` newest."""
    manifest = {"format": FORMAT, "run": run, "files": content}
    manifest["sha256"] = _manifest_digest(manifest)
    for folder in {(target / name).parent for name in content}:
        files.sync_folder(folder)
    files.replace(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    files.sync_folder(target.parent)
    name_latest(target)
    if keep:
        candidates = [
            folder for folder in steps(target.parent) if _number(folder) <= _number(target)
        ]
        complete = [folder for folder in candidates if (folder / MANIFEST).is_file()]
        for folder in set(candidates) - set(complete[:keep]):
            remove(folder)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest, without its own entry for that digest."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Delete a checkpoint.

    Its manifest goes first, so that a half-deleted checkpoint is never resumed from.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def name_latest(checkpoint: Path) -> None:
    """Write a checkpoint's name into `latest`; call it last, when the checkpoint is complete."""
    files.replace(checkpoint.with_name(LATEST), checkpoint.name)


def steps(folder: Path) -> list[Path]:
    """Return the checkpoint folders, complete or not, the highest step first."""
    if not folder.is_dir():
        return []
    folders = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def find(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to resume from: the one `latest` names, else the newest complete one.

    Returns:
        The checkpoint, and messages about damaged ones. None: no checkpoint was ever complete.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    notes: list[str] = []
    named = _read_latest(folder, notes)
    others = [path for path in steps(folder) if path != named]
    for path in [named, *others] if named else others:
        try:
            checkpoint = read(path)
        except DamagedCheckpoint as error:
            notes.append(f"{path} is damaged: {error}")
            continue
        if notes:
            notes.append(f"{path} is taken, the newest whole checkpoint")
        return checkpoint, notes
    if not (folder / LATEST).exists() and not any((p / MANIFEST).exists() for p in others):
        return None, notes
    raise ValueError(
        f"no checkpoint in {folder} is whole: {'; '.join(notes)}. Bring back the files, or remove"
        " the folder and start anew"
    )


def _read_latest(folder: Path, notes: list[str]) -> Path | None:
    """Return the folder that `latest` names; None: there is no such file, or it is damaged."""
    path = folder / LATEST
    if not path.is_file():
        return None
    name = path.read_bytes()[:100].decode("utf-8", errors="replace").strip()
    if STEP.fullmatch(name) is None:
        notes.append(f"{path} is damaged: it holds {name!r}, which is no name as step_000100")
        return None
    return folder / name


def read(folder: Path) -> Checkpoint:
    """Read the manifest of a checkpoint and compare the sizes of its files with it.

    Raises:
        DamagedCheckpoint: the folder, the manifest or a file is missing or differs.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DamagedCheckpoint("it is missing")
    if not path.is_file():
        raise DamagedCheckpoint(
            f"it has no {MANIFEST}, which is written when a checkpoint is complete"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        run = dict(manifest["run"])
        int(run["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        ) from None
    digest = _manifest_digest(manifest)
    if manifest.get("sha256", digest) != digest:  # manifests of older releases have none
        raise DamagedCheckpoint(f"{MANIFEST} is not what was saved (its SHA-256 is another one)")
    size_problem = files.wrong_size(folder, {name: size for name, (size, _) in content.items()})
    if size_problem:
        raise DamagedCheckpoint(size_problem)
    return Checkpoint(folder, run, content)


def load(engine: Engine, ranks: Ranks, checkpoint: Checkpoint, run: Mapping[str, Any]) -> None:
    """Restore a checkpoint, after checking that it belongs to this run and has not changed.

    Args:
        engine: the model and optimizer to restore.
        ranks: all ranks of the job; all of them call this.
        checkpoint: returned by ``find``.
        run: the settings that must equal the saved ones, as passed to ``save``.

    Raises:
        ValueError: on every rank: a setting differs (the message has both values), or a file has
            changed.
    """
    ranks.together(lambda: compare(checkpoint.folder, checkpoint.run, run))
    names_of_rank = sorted(checkpoint.files)[ranks.rank :: ranks.world]
    ranks.together(lambda: _verify(checkpoint, names_of_rank))
    engine.read(checkpoint.folder)


def _verify(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raise a ValueError if a named file's SHA-256 is not that of the manifest."""
    digests = files.hashes([checkpoint.folder / name for name in names])
    for name, digest in zip(names, digests, strict=True):
        if digest != checkpoint.files[name][1]:
            raise ValueError(
                f"cannot resume {checkpoint.folder}: {name} is not what was saved (its SHA-256 is"
                f" another one than in {MANIFEST}); bring that file back, or remove the folder, and"
                " --resume takes the checkpoint before it"
            )


def compare(source: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the settings of a run with those of a checkpoint, at any depth.

    Args:
        source: the checkpoint's folder, for the message.
        saved: the settings in the checkpoint; JSON.
        now: the settings of this run.

    Raises:
        ValueError: names the first setting that differs, and both values.
    """
    before, current = _flatten(saved), _flatten(json.loads(json.dumps(now)))
    tops = {name.partition(".")[0] for name in current}
    names = [*current, *(name for name in before if name.partition(".")[0] in tops)]
    for name in names:
        was, is_now = (values.get(name, "not set") for values in (before, current))
        if was != is_now or type(was) is not type(is_now):
            raise ValueError(
                f"cannot resume {source}: its {name} was {_as_text(was)}, now it is"
                f" {_as_text(is_now)};"
                " write what it was, or start a new run with another --out"
            )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted name."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= _flatten(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def _as_text(value: Any) -> str:
    return value if value == "not set" else json.dumps(value)
