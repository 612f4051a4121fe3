"""DeepSpeed's universal checkpoints, read and written without DeepSpeed."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_dist.checkpoint.plain import load_plain
from spectral_dist.checkpoint.run import Run, no_place, with_lr_ratios

ENGINE_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "ds_version"),
    *("shared_params", "frozen_param_fragments", "dp_world_size", "mp_world_size", "ds_config"),
    "checkpoint_parallel_dimensions",
}
"""Keys of DeepSpeed's files that are no state of the run, or are read from another place."""


MODEL_FILE = "mp_rank_00_model_states.pt"


MATRIX_STATE_KEY = "spectral_dist"
"""The key of DeepSpeed's files that says that matrix state was saved beside them."""


RULE = "spectral_rule"
"""The key of DeepSpeed's files for the name of the rule."""


class Ignored:
    """A stand-in for an object of DeepSpeed that holds nothing of a run."""

    def __init__(self, *arguments: Any) -> None:
        """Accept any arguments, and ignore them."""


STAND_INS: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Ignored,
    "deepspeed.utils.tensor_fragment.fragment_address": Ignored,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "builtins.getattr": Ignored,  # by which Python 3.11.0 to 3.11.3 pickles enums: that one
}
"""What takes the place of classes that are named in the state of ZeRO's optimizers."""


def _engine_files(folder: Path) -> list[dict[str, Any]]:
    """Return the content of each of the engine's files, of which stage 3 has more than one.

    Raises:
        ValueError: no universal checkpoint, or one with tensor or pipeline parallelism.
    """
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
    """Return the numbers in a file's name, to sort files by."""
    return [int(part) for part in path.stem.split("_") if part.isdigit()]


def read_universal(folder: Path) -> Run:
    """Return the run in a universal checkpoint, which is the folder that has zero/ in it.

    Raises:
        ValueError: it is not whole, has matrix state, or is of more than data parallelism.
    """
    engines = _engine_files(folder)
    if MATRIX_STATE_KEY in engines[0]:
        raise ValueError(no_place(folder))
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
                state = _read_zero(folder / "zero" / name, shape, group["kind"])
                whole[name] = state.pop("fp32")
                if stage3:
                    state["step"] = stage3["state"][i]["step"]
                run.state[name] = state
    for name, source in (engines[0].get("shared_params") or {}).items():
        whole[name] = whole[source]
    for path in Path(folder, "zero").iterdir():
        if path.is_dir() and path.name not in whole:
            raise ValueError(f"{path} is of a parameter that {folder} does not know")
    run.model = whole
    return run


def _read_zero(folder: Path, shape: torch.Size, kind: str) -> dict[str, Tensor]:
    """Return the tensors in a parameter's files, {"fp32", "step", "exp_avg", ...}.

    The second moment of a matrix is left out: the file has zeros, and the optimizer has none.

    Args:
        folder: of the parameter.
        shape: of the parameter.
        kind: 'matrix' or 'scalar'.

    Raises:
        ValueError: there is no weight.
    """
    tensors = {}
    for path in sorted(folder.glob("*.pt")):
        value = load_plain(path)
        value = value["param"] if isinstance(value, dict) else torch.as_tensor(value)
        tensors[path.stem] = value if path.stem == "step" else value.reshape(shape)
    if "fp32" not in tensors:
        raise ValueError(f"{folder} has no fp32.pt")
    if kind == "matrix" and not tensors.get("exp_avg_sq", torch.zeros(())).any():
        tensors.pop("exp_avg_sq", None)
    return tensors


def write_universal(folder: Path, run: Run) -> None:
    """Write a run as a universal checkpoint, which engines of any ZeRO stage load.

    Frozen weights and buffers are written as well, although engines do not load them.

    Raises:
        ValueError: a float64 tensor, keys of ``extra`` that DeepSpeed uses itself, or steps that
            differ between AdamW's parameters.
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
    for i, group in enumerate(with_lr_ratios([dict(group) for group in run.groups])):
        options = {k: tuple(v) if k == "betas" else v for k, v in group.items() if k != "names"}
        groups.append({**options, "params": [i], "id": i})  # the optimizer knows groups by "id"
    first = scalar if run.names("scalar") else steps[0]
    common = {
        "ds_version": "0.19.8",  # from which on the files are like this
        "param_groups": groups,
        # read by stage 3, which takes the first group's step for all
        "optimizer_state_dict": {
            "state": {i: {"step": torch.tensor(first)} for i in range(len(groups))},
            "param_groups": groups,
        },
    }
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    torch.save(_engine_state(run, int(max(steps))), folder / MODEL_FILE)
    try:  # stage 3 looks for another name
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
    """Return an engine's own state; its scheduler, DeepSpeed's or torch's, is at ``step``."""
    schedule = {"last_batch_iteration": step - 1, "last_epoch": step, "_step_count": step + 1}
    saved_schedule = run.extra.get("lr_scheduler")
    return {
        "module": run.model,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{n: run.model[n].shape for n in g["names"]} for g in run.groups],
        **{"dp_world_size": 1, "mp_world_size": 1, "global_steps": step, "skipped_steps": 0},
        **run.extra,
        **({RULE: run.rule} if run.rule else {}),
        "lr_scheduler": schedule | (saved_schedule if isinstance(saved_schedule, dict) else {}),
    }


def _write_zero(folder: Path, weight: Tensor, state: Mapping[str, Tensor]) -> None:
    """Write a parameter's files: its weight and its state, in float32."""
    folder.mkdir(parents=True)
    values = {key: value.float().clone() for key, value in {**state, "fp32": weight}.items()}
    # zeros without memory: stage 3 reads a second moment of matrices, too
    values.setdefault("exp_avg_sq", torch.zeros(1).expand(weight.shape))
    for key, value in values.items():
        torch.save(value if key == "step" else {"cat_dim": 0, "param": value}, folder / f"{key}.pt")
