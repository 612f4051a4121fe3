"""The JSON of --engine deepspeed: what of it is read here or trained by, checked in one line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectral_dist._errors import nearest, suggest
from spectral_dist.launch import files, yaml_config
from spectral_dist.launch.yaml_config import FLAG, Rule, is_number, whole
from spectral_dist.rules import registry

EXAMPLE = "configs/deepspeed/zero2.json"
_OBJECT: Rule = (lambda v: isinstance(v, dict), f"an object, as in {EXAMPLE}")
_TEXT: Rule = (lambda v: isinstance(v, str) and v != "", "a name in quotes")
_SIZE: Rule = (lambda v: is_number(v) and 0 <= v < math.inf, "a number, at least 0")
_BETAS: Rule = (
    lambda v: isinstance(v, list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
    "two numbers from 0 to below 1, as [0.9, 0.95]",
)
_STAGES: Rule = (lambda v: v in (0, 1, 2, 3) and not isinstance(v, bool), "0, 1, 2 or 3")
RULES: dict[str, Rule] = {
    "train_batch_size": whole(1),
    "train_micro_batch_size_per_gpu": whole(1),
    "gradient_accumulation_steps": whole(1),
    "gradient_clipping": _SIZE,
    "steps_per_print": whole(1),
    "bf16": _OBJECT,
    "bf16.enabled": FLAG,
    "fp16": _OBJECT,
    "fp16.enabled": FLAG,
    "zero_optimization": _OBJECT,
    "zero_optimization.stage": _STAGES,
    "scheduler": _OBJECT,
    "scheduler.type": _TEXT,
    "scheduler.params": _OBJECT,
    "scheduler.params.total_num_steps": whole(1),
    "scheduler.params.warmup_num_steps": whole(0),
    "scheduler.params.warmup_type": (lambda v: v in ("linear", "log"), '"linear" or "log"'),
    "scheduler.params.warmup_min_ratio": _SIZE,
    "scheduler.params.cos_min_ratio": _SIZE,
    "scheduler.params.warmup_min_lr": _SIZE,
    "scheduler.params.warmup_max_lr": _SIZE,
}
"""By path in the JSON; a folder comes before what is in it."""
OPTIMIZER_RULES: dict[str, Rule] = {
    "optimizer": _OBJECT,
    "optimizer.type": _TEXT,
    "optimizer.params": _OBJECT,
}
FOREIGN_RULES: dict[str, Rule] = {
    "optimizer.params.lr": _SIZE,
    "optimizer.params.betas": _BETAS,
    "optimizer.params.eps": _SIZE,
    "optimizer.params.weight_decay": _SIZE,
    "optimizer.params.momentum": _SIZE,
    "optimizer.params.torch_adam": FLAG,
    "optimizer.params.adam_w_mode": FLAG,
    "optimizer.params.amsgrad": FLAG,
}
"""Of optimizers that are not ours; ours know their options."""
BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
OTHER_BATCHES = ("elasticity", "sequence_parallel_size", "tensor_parallel", "expert_parallel")
"""With them a batch is not divided by all ranks."""
KEYS = {"optimizer": ("type", "params", "legacy_fusion"), "scheduler": ("type", "params")}
"""All that DeepSpeed reads of what it does not check."""


def load(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file as it is. ValueError: unreadable, or without an optimizer's type."""
    try:
        config = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"cannot read the DeepSpeed configuration {path}: {error}") from None
    if not isinstance(config, dict) or "optimizer" not in config:
        raise ValueError(f'{path}: expected an object with "optimizer": {{"type": ...}}')
    _check(path, config, OPTIMIZER_RULES)
    for folder, known in KEYS.items():
        inner = config.get(folder)
        for key in inner if isinstance(inner, dict) else ():
            if key not in known:
                raise ValueError(f"{path}: {folder}: unknown key {key!r}{suggest(key, known)}")
    if "type" not in config["optimizer"]:
        raise ValueError(f'{path}: optimizer has no "type"; write one, as in {EXAMPLE}')
    return config


def read(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file that can be trained with.

    Raises:
        ValueError: in one line: as of ``load``, or a value of another type.
    """
    config = load(path)
    _check(path, config, RULES)
    if _is_ours(config):
        _read_ours(path, config)
    else:
        _check(path, config, FOREIGN_RULES)
    return config


def scheduled_steps(path: Path) -> int:
    """total_num_steps of a DeepSpeed JSON's scheduler. ValueError: it has none."""
    total = read(path).get("scheduler", {}).get("params", {}).get("total_num_steps")
    if total is None:
        raise ValueError(f"--steps is needed: {path} has no total_num_steps")
    return int(total)


def identity(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint brings with it, so that it cannot be changed; JSON."""
    optimizer = config["optimizer"]
    own = {"type": optimizer["type"], **optimizer.get("params", {})}
    if _is_ours(config):
        own = yaml_config.optimizer_identity(*_read_ours(path, config))
    halves = {name: config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
    return {
        "engine": "deepspeed",
        "optimizer": own,
        "scheduler": config.get("scheduler"),
        "gradient_clipping": float(config.get("gradient_clipping", 0.0)),
        **halves,
    }


def check_batch(path: Path, config: Mapping[str, Any], ranks: int) -> None:
    """Raise a ValueError if a batch cannot be divided, which DeepSpeed says of derived numbers."""
    if any(name in config for name in OTHER_BATCHES) or BATCH[0] not in config:
        return
    batch, micro, accumulated = (config.get(name, 1) for name in BATCH)
    parts = micro * accumulated * ranks
    exactly = all(name in config for name in BATCH)
    if batch % parts or (exactly and batch != parts):
        wanted = str(parts) if exactly else f"a multiple of {parts}"
        raise ValueError(
            f"{path}: {BATCH[0]} is {batch}; with {BATCH[1]} {micro}, {BATCH[2]} {accumulated} and"
            f" {ranks} rank(s) it must be {wanted}"
        )


class Noted(dict[str, Any]):
    """A DeepSpeed configuration that knows which of its settings DeepSpeed has asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: dict[str, None] = {}  # in the order in which each was asked for last

    def _note(self, key: object) -> None:
        self.asked.pop(str(key), None)
        self.asked[str(key)] = None

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting or the default, and note that it was asked for."""
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def last(self) -> str | None:
        """The setting of it that was asked for last."""
        return next((key for key in reversed(self.asked) if dict.__contains__(self, key)), None)

    def ignored(self, path: Path) -> list[str]:
        """What there is to say of settings that nobody has asked for.

        Raises:
            ValueError: one is a slip of a setting that DeepSpeed has.
        """
        unread = [key for key in self if key not in self.asked]
        for key in unread:
            meant = nearest(key, self.asked)
            if meant:
                raise ValueError(f"{path}: unknown key {key!r}; did you mean {meant!r}?")
        return [f"{path}: DeepSpeed has no setting {key!r}: ignored" for key in unread]


@contextlib.contextmanager
def named_errors(path: Path, noted: Noted | None = None) -> Iterator[None]:
    """Say in one line, with the file, what DeepSpeed or torch does not take of a configuration.

    Args:
        path: of the file.
        noted: what DeepSpeed reads of it, for errors that name no setting.

    Raises:
        ValueError: instead of what they raise for a wrong setting.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        what = " ".join(str(error).split()) or "it gives no reason"
        kind = "" if type(error) is ValueError else f"DeepSpeed: {type(error).__name__}: "
        last = noted and noted.last()
        if noted and last and not any(key in what for key in noted):
            what += f" (the last setting that it has read is {last!r}: {dict.get(noted, last)!r})"
        raise ValueError(f"{path}: {kind}{what}") from error


def _check(path: Path, config: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for name, rule in rules.items():
        *folders, last = name.split(".")
        inner: Any = config
        for folder in folders:
            inner = inner.get(folder, {})
        if last in inner:
            yaml_config.check(f"{path}: {name}", inner[last], rule)


def _is_ours(config: Mapping[str, Any]) -> bool:
    return str(config["optimizer"]["type"]) in _ours()


def _ours() -> dict[str, Any]:
    return {entry.deepspeed_type: entry.options for entry in registry.entries()}


def _read_ours(path: Path, config: Mapping[str, Any]) -> tuple[str, Any, Any, Any]:
    optimizer = config["optimizer"]
    params = optimizer.get("params", {})
    if "type" in params:
        raise ValueError(f'{path}: optimizer.params has a "type"; it stands beside "params"')
    return yaml_config.read_optimizer(path, {**params, "type": optimizer["type"]}, _ours(), "")
