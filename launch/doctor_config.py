"""Check those values of a config that `spectral-dist doctor` replaces by its own and never runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING

AUTO = "auto"
"""A value that Hugging Face's Trainer replaces by its own arguments."""
COUNTS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    "steps_per_print",
)


def check_values(config: Mapping[str, Any]) -> None:
    """Check values that doctor replaces by its own, and that training would refuse.

    Args:
        config: the user's, whose optimizer is one that doctor checks.

    Raises:
        ValueError: names the setting, and what it must be.
    """
    optimizer = config["optimizer"]
    params = optimizer.get("params", {})
    if not isinstance(params, Mapping):
        raise ValueError(f'optimizer.params is {params!r}; write an object, as {{"lr": 0.02}}')
    options = {k: v for k, v in params.items() if k not in ROUTING and v != AUTO}
    for entry in registry.entries():
        if entry.deepspeed_type == optimizer["type"]:
            entry.options.from_user(options, entry.deepspeed_type)
    counts = {name: config[name] for name in COUNTS if config.get(name, AUTO) != AUTO}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; write a whole number, at least 1")
    global_batch, micro, accumulation = (counts.get(name) for name in COUNTS[:3])
    if global_batch and global_batch % ((micro or 1) * (accumulation or 1)):
        raise ValueError(
            f"train_batch_size is {global_batch}, which is no multiple of {micro or 1} rows in"
            f" {accumulation or 1} micro-batches on any number of ranks; change one of"
            f" {', '.join(COUNTS[:3])}"
        )
    clip = config.get("gradient_clipping", AUTO)
    is_number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip != AUTO and not (is_number and 0 <= clip < math.inf):
        raise ValueError(f"gradient_clipping is {clip!r}; write a number, at least 0")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Check that DeepSpeed can build the scheduler, since doctor trains without one.

    Raises:
        ValueError: with what DeepSpeed says of it.
    """
    section = config.get("scheduler")
    if section is None:
        return
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ValueError(f'scheduler is {section!r}; write an object with a "type"')
    params = section.get("params", {})
    if not isinstance(params, Mapping):
        raise ValueError(f"scheduler.params is {params!r}; write an object")
    if AUTO in params.values():
        return
    from deepspeed.runtime import lr_schedules

    name = section["type"]
    kind = getattr(lr_schedules, name, getattr(torch.optim.lr_scheduler, name, None))
    if kind is None:
        raise ValueError(f'scheduler.type is "{name}", which neither DeepSpeed nor torch knows')
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        scheduler = kind(optimizer, **params)
        optimizer.step()
        scheduler.step()
    except Exception as error:  # a value of another type may raise any error
        raise ValueError(f'scheduler "{name}": {type(error).__name__}: {error}') from error
