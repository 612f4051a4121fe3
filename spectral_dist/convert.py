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
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from spectral_dist import checkpoint_files as files
from spectral_dist.checkpoint_plain import first, load_plain
from spectral_dist.state_dicts import Run, rated, read_dion, read_torch, write_dion, write_torch

ENGINE_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "ds_version"),
    *("shared_params", "frozen_param_fragments", "dp_world_size", "mp_world_size", "ds_config"),
    "checkpoint_parallel_dimensions",
}
"""In DeepSpeed's files: what is no state, or is read from elsewhere."""
MODEL_FILE = "mp_rank_00_model_states.pt"
BESIDE = "spectral_dist"
"""In DeepSpeed's files: that matrix state was saved beside them."""
RULE = "spectral_rule"
"""In DeepSpeed's files: the name of the rule."""


class Ignored:
    """What takes the place of an object of DeepSpeed that says nothing of a run."""

    def __init__(self, *given: Any) -> None:
        """Take and leave whatever it was made of."""


STAND_INS: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Ignored,
    "deepspeed.utils.tensor_fragment.fragment_address": Ignored,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "builtins.getattr": Ignored,  # by which Python 3.11.0 to 3.11.3 pickles enums: that one
}
"""Classes that are named in the state of ZeRO's optimizers."""


def convert(from_format: str, source: str | Path, to_format: str, target: str | Path) -> Run:
    """Write the checkpoint ``source`` as ``target``, which must not exist; what was in it.

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
    except BaseException:  # what is there of it is none, and would be in the way
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                target.unlink()
        raise
    return run


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise a ValueError for whatever junk in a file, or the file system, makes of the code."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {first(error)}") from error


# -- dcp


def _read_dcp(folder: Path) -> Run:
    files.verify(folder, alone=True)
    metadata = files.read_metadata(folder)
    content: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else b""
        for key, entry in metadata.state_dict_metadata.items()
    }
    files.read(folder, content, flat=False)
    run = Run()
    for key, path in (metadata.planner_data or {}).items():
        match path:
            case ("model", name) if isinstance(content[key], Tensor):
                run.model[name] = content[key]
            case ("optimizer", "state", name, what):
                run.state.setdefault(name, {})[what] = content[key]
            case ("optimizer", "groups"):
                run.groups = json.loads(content[key])
                rules = [group.pop("rule", None) for group in run.groups]
                run.rule = rules[0] if rules else None
            case ("optimizer", "matrices", *_):
                raise ValueError(_no_place(folder))
            case ("extra",):
                run.extra = torch.load(io.BytesIO(content[key]), weights_only=True)
            case _:
                raise ValueError(f"{folder}: {key} is nothing that spectral_dist saves")
    return run


def _write_dcp(folder: Path, run: Run) -> None:
    file = io.BytesIO()
    torch.save(run.extra, file)
    groups = [{**group, "rule": run.rule} for group in run.groups]
    content = {
        "model": run.model,
        "optimizer": {"state": run.state, "groups": json.dumps(groups)},
        "extra": file.getvalue(),
    }
    files.write(folder, content, alone=True)


def _no_place(folder: Path) -> str:
    return (
        f"{folder} holds matrix state (SUMO's bases and moments), for which no other format has a"
        " place; load it with the optimizer that saved it, on any number of ranks"
    )


# -- universal


def _engine_files(folder: Path) -> list[dict[str, Any]]:
    """What each of the engine's files holds; more than one at stage 3."""
    if not Path(folder, "zero", "optimizer_state.pt").is_file():
        raise ValueError(
            f"{folder} is no universal checkpoint: there is no zero/optimizer_state.pt in it; make"
            " one by python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
        )
    paths = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if not paths:
        paths = sorted(folder.glob("zero_pp_rank_*_model_states.pt"), key=_numbers)
    content: list[dict[str, Any]] = [load_plain(path) for path in paths]
    degrees = [d for f in content for d in f.get("checkpoint_parallel_dimensions", {}).values()]
    if not content or max(degrees, default=1) > 1 or "module" not in content[0]:
        raise ValueError(f"{folder}: only checkpoints without tensor and pipeline parallelism")
    return content


def _numbers(path: Path) -> list[int]:
    return [int(part) for part in path.stem.split("_") if part.isdigit()]


def _read_universal(folder: Path) -> Run:
    engines = _engine_files(folder)
    if BESIDE in engines[0]:
        raise ValueError(_no_place(folder))
    common = load_plain(folder / "zero" / "optimizer_state.pt", STAND_INS)
    if common.get("dynamic_loss_scale"):
        warnings.warn(f"{folder}: fp16's loss scale is left behind; it starts anew", stacklevel=4)
    shapes: list[Mapping[str, torch.Size]] = engines[0]["param_shapes"]
    whole = {name: value for name, value in engines[0]["module"].items() if value is not None}
    for name, shape in (engines[0].get("frozen_param_shapes") or {}).items():
        if whole[name].shape != shape:  # stage 3
            parts = [file["frozen_param_fragments"][name].flatten() for file in engines]
            whole[name] = torch.cat(parts)[: math.prod(shape)].view(shape)
    extra = {k: v for k, v in engines[0].items() if k not in ENGINE_KEYS and v is not None}
    run = Run(rule=extra.pop(RULE, None), extra=extra)
    stage3 = common.get("optimizer_state_dict")
    groups = (stage3 or common)["param_groups"]
    parts_of = [group["params"] if stage3 else [i] for i, group in enumerate(groups)]
    if sorted(i for parts in parts_of for i in parts) != list(range(len(shapes))):
        raise ValueError(f"{folder}: {len(groups)} groups do not make up its {len(shapes)} parts")
    order = {name: i for i, name in enumerate(whole)}
    for group, indices in zip(groups, parts_of, strict=True):
        options = {k: v for k, v in group.items() if k not in ("params", "id")}
        names = [name for i in indices for name in shapes[i]]
        run.groups.append({**options, "names": sorted(names, key=order.__getitem__)})
        for i in indices:
            for name, shape in shapes[i].items():
                found = _read_zero(folder / "zero" / name, shape, group["kind"])
                whole[name] = found.pop("fp32")
                run.state[name] = (
                    found if not stage3 else found | {"step": stage3["state"][i]["step"]}
                )
    for name, source in (engines[0].get("shared_params") or {}).items():
        whole[name] = whole[source]
    for path in Path(folder, "zero").iterdir():
        if path.is_dir() and path.name not in whole:
            raise ValueError(f"{path} is of a parameter that {folder} does not know")
    run.model = whole
    return run


def _read_zero(folder: Path, shape: torch.Size, kind: str) -> dict[str, Tensor]:
    """A parameter's files; the second moment of a matrix, which is there as zeros, is none."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        value = load_plain(path)
        value = value["param"] if isinstance(value, dict) else torch.as_tensor(value)
        found[path.stem] = value if path.stem == "step" else value.reshape(shape)
    if "fp32" not in found:
        raise ValueError(f"{folder} has no fp32.pt")
    if kind == "matrix" and not found.get("exp_avg_sq", torch.zeros(())).any():
        found.pop("exp_avg_sq", None)
    return found


def _write_universal(folder: Path, run: Run) -> None:
    """Write it for any stage.

    It holds frozen weights and buffers, too, though engines do not load them.
    """
    latest = _latest_universal(folder)
    for name in run.state:
        if any(t.dtype == torch.float64 for t in (run.model[name], *run.state[name].values())):
            raise ValueError(f"{name} or its state is float64; DeepSpeed keeps float32 only")
    if taken := sorted(run.extra.keys() & ENGINE_KEYS):
        raise ValueError(f"extra {taken} would overwrite what DeepSpeed keeps by that name")
    scalar = run.steps("scalar", run.names("scalar"), "universal")
    steps = [
        scalar if g["kind"] == "scalar" else run.steps("matrix", g["names"], "universal")
        for g in run.groups
    ]
    for group, step in zip(run.groups, steps, strict=True):
        for name in group["names"]:
            state = run.state[name] | {"step": torch.tensor(step)}
            _write_zero(folder / "zero" / name, run.model[name], state)
    groups = []
    for i, group in enumerate(rated([dict(group) for group in run.groups])):
        options = {k: tuple(v) if k == "betas" else v for k, v in group.items() if k != "names"}
        groups.append({**options, "params": [i], "id": i})  # by which the optimizer knows them
    first = scalar if run.names("scalar") else steps[0]
    common = {
        "ds_version": "0.19.8",  # from which on the files are like this
        "param_groups": groups,
        # where stage 3 looks; it takes the first step for all
        "optimizer_state_dict": {
            "state": {i: {"step": torch.tensor(first)} for i in range(len(groups))},
            "param_groups": groups,
        },
    }
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    torch.save(_engine_state(run, int(max(steps))), folder / MODEL_FILE)
    try:  # stage 3's name for it
        os.link(folder / MODEL_FILE, folder / f"zero_pp_rank_0_{MODEL_FILE}")
    except OSError:
        shutil.copyfile(folder / MODEL_FILE, folder / f"zero_pp_rank_0_{MODEL_FILE}")
    if not latest.exists():
        latest.write_text(folder.name)


def _latest_universal(folder: Path) -> Path:
    """Return the file beside ``folder`` in which an engine that is given no tag looks for one.

    Raises:
        ValueError: it names another checkpoint.
    """
    latest = folder.parent / "latest_universal"
    if latest.exists() and (tag := latest.read_text().strip()) != folder.name:
        raise ValueError(
            f"{latest} names {tag!r}, which engines would no longer load; write to"
            f" {folder / folder.name}, whose folder has none, or move {latest} away"
        )
    return latest


def _engine_state(run: Run, step: int) -> dict[str, Any]:
    """What an engine reads of its own; schedulers of DeepSpeed and of torch are at ``step``."""
    schedule = {"last_batch_iteration": step - 1, "last_epoch": step, "_step_count": step + 1}
    given = run.extra.get("lr_scheduler")
    return {
        "module": run.model,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{n: run.model[n].shape for n in g["names"]} for g in run.groups],
        **{"dp_world_size": 1, "mp_world_size": 1, "global_steps": step, "skipped_steps": 0},
        **run.extra,
        **({RULE: run.rule} if run.rule else {}),
        "lr_scheduler": {**schedule, **given} if isinstance(given, dict) else schedule,
    }


def _write_zero(folder: Path, weight: Tensor, state: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    values = {key: value.float().clone() for key, value in {**state, "fp32": weight}.items()}
    # zeros without memory: stage 3 reads a second moment of matrices, too
    values.setdefault("exp_avg_sq", torch.zeros(1).expand(weight.shape))
    for key, value in values.items():
        torch.save(value if key == "step" else {"cat_dim": 0, "param": value}, folder / f"{key}.pt")


FORMATS: dict[str, tuple[Callable[[Path], Run], Callable[[Path, Run], None]]] = {
    "dcp": (_read_dcp, _write_dcp),
    "universal": (_read_universal, _write_universal),
    "torch": (read_torch, write_torch),
    "dion": (read_dion, write_dion),
}
"""name -> (its reader, its writer)"""
