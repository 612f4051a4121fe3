"""Checkpoints of a run: a folder each, with a manifest, and `latest`, which names a whole one."""

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


class Damaged(Exception):
    """A checkpoint that is not whole; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole one: ``run`` is what it was saved with, ``files`` their [bytes, SHA-256] by name."""

    folder: Path
    run: State
    files: Mapping[str, tuple[int, str]]


def save(engine: Engine, ranks: Ranks, folder: Path, run: State, keep: int = 0) -> Path:
    """Write a checkpoint of ``run["step"]`` into ``folder`` and name it; on all ranks.

    Every rank hashes some of the files, and syncs them to disk. `latest` follows when all is there.

    Args:
        engine: what to save.
        ranks: of the job.
        folder: of all checkpoints of the run.
        run: what to go on with, and what must be the same then; JSON.
        keep: the number to keep, those of the highest steps up to this one; 0: all.

    Raises:
        ValueError: on every rank: a file of it cannot be read again.
        OSError: why a rank cannot write its part: the disk is full, say.
    """
    target = folder / f"step_{run['step']:06d}"
    ranks.on_first(lambda: _clear(target))
    _write(engine, target)
    # The sum of all ranks' answers is also the barrier that no file is written after.
    names = ranks.on_first(lambda: sorted(files.below(target).items(), key=lambda item: -item[1]))
    share = [name for name, _ in names[ranks.rank :: ranks.world]]
    digests: dict[str, str] = {}
    for part in ranks.together(lambda: _hash(target, share)):
        digests |= part
    content = {name: [size, digests[name]] for name, size in sorted(names)}
    ranks.on_first(lambda: _seal(target, run, content, keep))
    return target


def _clear(target: Path) -> None:
    """Remove what an earlier run left of this step, which it did not finish or resume from."""
    if target.exists():
        remove(target)
    target.mkdir(parents=True)


def _write(engine: Engine, target: Path) -> None:
    """Have it written. Of a full disk torch may say no more than "unexpected pos 704 vs 598"."""
    try:
        engine.write(target)
    except (Exception, CheckpointException) as error:
        try:
            files.probe(target)
        except OSError as reason:
            what = f"{reason.strerror}: this checkpoint is not whole, go on from one before it"
            raise OSError(reason.errno, what, str(target)) from error
        raise


def _hash(folder: Path, names: list[str]) -> dict[str, str]:
    return dict(zip(names, files.hashes([folder / n for n in names], sync=True), strict=True))


def _seal(target: Path, run: State, content: Mapping[str, Any], keep: int) -> None:
    manifest = {"format": FORMAT, "run": run, "files": content}
    manifest["sha256"] = _digest(manifest)
    for folder in {(target / name).parent for name in content}:
        files.sync_folder(folder)
    files.replace(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    files.sync_folder(target.parent)
    name_latest(target)
    if keep:
        done = [folder for folder in steps(target.parent) if _number(folder) <= _number(target)]
        whole = [folder for folder in done if (folder / MANIFEST).is_file()]
        for folder in set(done) - set(whole[:keep]):
            remove(folder)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all else that a manifest says."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Delete a checkpoint; first its manifest, so that what a kill leaves is never taken."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def name_latest(checkpoint: Path) -> None:
    """Make it the one that ``latest`` names: last, so that it is never one that is not whole."""
    files.replace(checkpoint.with_name(LATEST), checkpoint.name)


def steps(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, whole or not, the highest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def find(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Look for the checkpoint to go on from: what `latest` names, else the newest whole one.

    Returns:
        It, and what there is to say about others; None: none was ever complete.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    notes: list[str] = []
    named = _named(folder, notes)
    others = [path for path in steps(folder) if path != named]
    for path in [named, *others] if named else others:
        try:
            checkpoint = read(path)
        except Damaged as damage:
            notes.append(f"{path} is damaged: {damage}")
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


def _named(folder: Path, notes: list[str]) -> Path | None:
    """What `latest` names, which is a checkpoint beside it and nothing else."""
    path = folder / LATEST
    if not path.is_file():
        return None
    name = path.read_bytes()[:100].decode("utf-8", errors="replace").strip()
    if STEP.fullmatch(name) is None:
        notes.append(f"{path} is damaged: it holds {name!r}, which is no name as step_000100")
        return None
    return folder / name


def read(folder: Path) -> Checkpoint:
    """Read the manifest of a checkpoint, and compare the sizes of its files.

    Raises:
        Damaged: what is wrong.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise Damaged("it is missing")
    if not path.is_file():
        raise Damaged(f"it has no {MANIFEST}, which is written when a checkpoint is complete")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        run = dict(manifest["run"])
        int(run["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    if manifest.get("sha256", _digest(manifest)) != _digest(manifest):  # older ones have none
        raise Damaged(f"{MANIFEST} is not what was saved (its SHA-256 is another one)")
    wrong = files.wrong_size(folder, {name: size for name, (size, _) in content.items()})
    if wrong:
        raise Damaged(wrong)
    return Checkpoint(folder, run, content)


def load(engine: Engine, ranks: Ranks, checkpoint: Checkpoint, run: Mapping[str, Any]) -> None:
    """Restore a checkpoint, once it is known to be of this run and as it was written.

    Args:
        engine: what to restore.
        ranks: of the job; all of them call this.
        checkpoint: of ``find``.
        run: what must be the same as when it was saved, as given to ``save``.

    Raises:
        ValueError: on every rank: another setting, with both values, or a file that has changed.
    """
    ranks.together(lambda: compare(checkpoint.folder, checkpoint.run, run))
    share = sorted(checkpoint.files)[ranks.rank :: ranks.world]
    ranks.together(lambda: _verify(checkpoint, share))
    engine.read(checkpoint.folder)


def _verify(checkpoint: Checkpoint, names: list[str]) -> None:
    digests = files.hashes([checkpoint.folder / name for name in names])
    for name, digest in zip(names, digests, strict=True):
        if digest != checkpoint.files[name][1]:
            raise ValueError(
                f"cannot resume {checkpoint.folder}: {name} is not what was saved (its SHA-256 is"
                f" another one than in {MANIFEST}); bring that file back, or remove the folder, and"
                " --resume takes the checkpoint before it"
            )


def compare(source: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the settings of a run with those of a checkpoint; JSON, in any depth.

    Raises:
        ValueError: names the first that differs, and both values.
    """
    before, here = _flat(saved), _flat(json.loads(json.dumps(now)))
    tops = {name.partition(".")[0] for name in here}
    names = [*here, *(name for name in before if name.partition(".")[0] in tops)]
    for name in names:
        was, is_now = (values.get(name, "not set") for values in (before, here))
        if was != is_now or type(was) is not type(is_now):
            raise ValueError(
                f"cannot resume {source}: its {name} was {_said(was)}, now it is {_said(is_now)};"
                " write what it was, or start a new run with another --out"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def _said(value: Any) -> str:
    return value if value == "not set" else json.dumps(value)
