"""Read and check the DeepSpeed JSON of --engine deepspeed, with errors of one line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectral_dist._errors import nearest, suggest
from spectral_dist.launch import files, yaml_config
from spectral_dist.launch.yaml_config import FLAG, Constraint, integer_from, is_number
from spectral_dist.rules import registry

EXAMPLE = "configs/deepspeed/zero2.json"
_OBJECT: Constraint = (lambda v: isinstance(v, dict), f"an object, as in {EXAMPLE}")
_TEXT: Constraint = (lambda v: isinstance(v, str) and v != "", "a name in quotes")
_SIZE: Constraint = (lambda v: is_number(v) and 0 <= v < math.inf, "a number, at least 0")
_BETAS: Constraint = (
    lambda v: isinstance(v, list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
    "two numbers from 0 to below 1, as [0.9, 0.95]",
)
_STAGES: Constraint = (lambda v: v in (0, 1, 2, 3) and not isinstance(v, bool), "0, 1, 2 or 3")
CONSTRAINTS: dict[str, Constraint] = {
    "train_batch_size": integer_from(1),
    "train_micro_batch_size_per_gpu": integer_from(1),
    "gradient_accumulation_steps": integer_from(1),
    "gradient_clipping": _SIZE,
    "steps_per_print": integer_from(1),
    "bf16": _OBJECT,
    "bf16.enabled": FLAG,
    "fp16": _OBJECT,
    "fp16.enabled": FLAG,
    "zero_optimization": _OBJECT,
    "zero_optimization.stage": _STAGES,
    "scheduler": _OBJECT,
    "scheduler.type": _TEXT,
    "scheduler.params": _OBJECT,
    "scheduler.params.total_num_steps": integer_from(1),
    "scheduler.params.warmup_num_steps": integer_from(0),
    "scheduler.params.warmup_type": (lambda v: v in ("linear", "log"), '"linear" or "log"'),
    "scheduler.params.warmup_min_ratio": _SIZE,
    "scheduler.params.cos_min_ratio": _SIZE,
    "scheduler.params.warmup_min_lr": _SIZE,
    "scheduler.params.warmup_max_lr": _SIZE,
}
"""By path in the JSON; a section comes before its keys."""
OPTIMIZER_CONSTRAINTS: dict[str, Constraint] = {
    "optimizer": _OBJECT,
    "optimizer.type": _TEXT,
    "optimizer.params": _OBJECT,
}
OTHER_OPTIMIZER_CONSTRAINTS: dict[str, Constraint] = {
    "optimizer.params.lr": _SIZE,
    "optimizer.params.betas": _BETAS,
    "optimizer.params.eps": _SIZE,
    "optimizer.params.weight_decay": _SIZE,
    "optimizer.params.momentum": _SIZE,
    "optimizer.params.torch_adam": FLAG,
    "optimizer.params.adam_w_mode": FLAG,
    "optimizer.params.amsgrad": FLAG,
}
"""For optimizers of DeepSpeed or torch; spectral ones check their own options."""
BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
OTHER_DIVISIONS = ("elasticity", "sequence_parallel_size", "tensor_parallel", "expert_parallel")
"""Settings with which a batch is not divided evenly among all ranks."""
SECTION_KEYS = {"optimizer": ("type", "params", "legacy_fusion"), "scheduler": ("type", "params")}
"""All keys that DeepSpeed reads in sections whose keys it does not check."""


def load(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file without checking more than its optimizer's section.

    Raises:
        ValueError: the file cannot be read, or names no optimizer type.
    """
    try:
        config = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"cannot read the DeepSpeed configuration {path}: {error}") from None
    if not isinstance(config, dict) or "optimizer" not in config:
        raise ValueError(f'{path}: expected an object with "optimizer": {{"type": ...}}')
    _check(path, config, OPTIMIZER_CONSTRAINTS)
    for section_name, known in SECTION_KEYS.items():
        section = config.get(section_name)
        for key in section if isinstance(section, dict) else ():
            if key not in known:
                raise ValueError(
                    f"{path}: {section_name}: unknown key {key!r}{suggest(key, known)}"
                )
    if "type" not in config["optimizer"]:
        raise ValueError(f'{path}: optimizer has no "type"; write one, as in {EXAMPLE}')
    return config


def read(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and check every value that training depends on.

    Raises:
        ValueError: in one line: see ``load``; or a value is of another type or out of range.
    """
    config = load(path)
    _check(path, config, CONSTRAINTS)
    if _is_spectral(config):
        _read_spectral_options(path, config)
    else:
        _check(path, config, OTHER_OPTIMIZER_CONSTRAINTS)
    return config


def scheduled_steps(path: Path) -> int:
    """Return total_num_steps of the scheduler in a DeepSpeed JSON file.

    Raises:
        ValueError: there is none.
    """
    total = read(path).get("scheduler", {}).get("params", {}).get("total_num_steps")
    if total is None:
        raise ValueError(f"--steps is needed: {path} has no total_num_steps")
    return int(total)


def identity(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a resumed run must not change, as JSON."""
    optimizer = config["optimizer"]
    settings = {"type": optimizer["type"], **optimizer.get("params", {})}
    if _is_spectral(config):
        settings = yaml_config.optimizer_identity(*_read_spectral_options(path, config))
    precisions = {name: config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
    return {
        "engine": "deepspeed",
        "optimizer": settings,
        "scheduler": config.get("scheduler"),
        "gradient_clipping": float(config.get("gradient_clipping", 0.0)),
        **precisions,
    }


def check_batch(path: Path, config: Mapping[str, Any], ranks: int) -> None:
    """Check that the batch can be divided among ranks and micro-batches.

    DeepSpeed's own error names derived numbers, not those of the file.

    Raises:
        ValueError: names the settings, and what the batch size must be.
    """
    if any(name in config for name in OTHER_DIVISIONS) or BATCH[0] not in config:
        return
    batch, micro, accumulated = (config.get(name, 1) for name in BATCH)
    product = micro * accumulated * ranks
    all_written = all(name in config for name in BATCH)
    if batch % product or (all_written and batch != product):
        wanted = str(product) if all_written else f"a multiple of {product}"
        raise ValueError(
            f"{path}: {BATCH[0]} is {batch}; with {BATCH[1]} {micro}, {BATCH[2]} {accumulated} and"
            f" {ranks} rank(s) it must be {wanted}"
        )


class ReadTracker(dict[str, Any]):
    """A DeepSpeed configuration that records which of its settings DeepSpeed has read.

    Attributes:
        reads: the keys that were read, as an ordered set: the last one read comes last.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.reads: dict[str, None] = {}

    def _record_read(self, key: object) -> None:
        self.reads.pop(str(key), None)
        self.reads[str(key)] = None

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting or the default, and record that it was read."""
        self._record_read(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._record_read(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._record_read(key)
        return super().__contains__(key)

    def last_read(self) -> str | None:
        """Return the setting of this configuration that was read last; None: none was."""
        return next((key for key in reversed(self.reads) if dict.__contains__(self, key)), None)

    def unread_warnings(self, path: Path) -> list[str]:
        """Return one warning for each setting that nobody has read.

        Raises:
            ValueError: one is a misspelling of a setting that DeepSpeed has.
        """
        unread_keys = [key for key in self if key not in self.reads]
        for key in unread_keys:
            suggestion = nearest(key, self.reads)
            if suggestion:
                raise ValueError(f"{path}: unknown key {key!r}; did you mean {suggestion!r}?")
        return [f"{path}: DeepSpeed has no setting {key!r}: ignored" for key in unread_keys]


@contextlib.contextmanager
def named_errors(path: Path, tracker: ReadTracker | None = None) -> Iterator[None]:
    """Turn errors of DeepSpeed or torch about a configuration into one line that names the file.

    Args:
        path: the file.
        tracker: the configuration that DeepSpeed reads; with it, an error that names no setting
            is followed by the last one read.

    Raises:
        ValueError: in place of what they raise for a wrong setting.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        what = " ".join(str(error).split()) or "it gives no reason"
        kind = "" if type(error) is ValueError else f"DeepSpeed: {type(error).__name__}: "
        last_read = tracker and tracker.last_read()
        if tracker and last_read and not any(key in what for key in tracker):
            value = dict.get(tracker, last_read)
            what += f" (the last setting that it has read is {last_read!r}: {value!r})"
        raise ValueError(f"{path}: {kind}{what}") from error


def _check(path: Path, config: Mapping[str, Any], constraints: Mapping[str, Constraint]) -> None:
    """Check each value of a configuration that has a constraint."""
    for name, constraint in constraints.items():
        *sections, key = name.split(".")
        section: Any = config
        for section_name in sections:
            section = section.get(section_name, {})
        if key in section:
            yaml_config.check(f"{path}: {name}", section[key], constraint)


def _is_spectral(config: Mapping[str, Any]) -> bool:
    """Return whether the optimizer is one of spectral_dist's."""
    return str(config["optimizer"]["type"]) in _spectral_options()


def _spectral_options() -> dict[str, Any]:
    """Return the options class of each spectral optimizer by its DeepSpeed type."""
    return {entry.deepspeed_type: entry.options for entry in registry.entries()}


def _read_spectral_options(path: Path, config: Mapping[str, Any]) -> tuple[str, Any, Any, Any]:
    """Return type, options, routing and rotation of a spectral optimizer."""
    optimizer = config["optimizer"]
    params = optimizer.get("params", {})
    if "type" in params:
        raise ValueError(f'{path}: optimizer.params has a "type"; it stands beside "params"')
    return yaml_config.read_optimizer(
        path, {**params, "type": optimizer["type"]}, _spectral_options(), ""
    )
