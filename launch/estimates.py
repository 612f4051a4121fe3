"""What `spectral-dist estimate` reads and prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from spectral_dist.estimate import QUANTITIES, Estimate, Job, estimate
from spectral_dist.poet.convert import SETTINGS, convert
from spectral_dist.rules.options import ROUTING

UNITS = {"flops": (1e12, "TFLOP"), "polar_calls": (1, "")}
"""What a quantity is divided by, and its unit; bytes otherwise."""


def option_of(text: str) -> tuple[str, Any]:
    """Return the name and value of an option, which is read as JSON where it is JSON.

    Raises:
        ValueError: the text is not of the form NAME=VALUE.
    """
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise ValueError(f"--option {text!r}: write a name and a value, as momentum=0.9")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def estimate_of(model: nn.Module, job: Job, optimizer: str, options: Sequence[str]) -> Estimate:
    """Return the estimate of a model, with options as the command line has them.

    Among them may be those of ``param_groups``, and for POET the settings of ``poet.convert``.

    Args:
        model: on the meta device; POET converts it.
        job: the engine and its ranks.
        optimizer: the optimizer's name.
        options: NAME=VALUE each.

    Raises:
        ValueError: a malformed, unknown or bad option.
    """
    values = dict(map(option_of, options))
    routing = {name: values.pop(name) for name in ROUTING if name in values}
    if optimizer == "poet":
        settings = {name: values.pop(name) for name in SETTINGS if name in values}
        patterns = {name: routing.pop(name) for name in ("matrices", "scalars") if name in routing}
        convert(model, **patterns, **settings)
    return estimate(model, job, optimizer, values, routing)


def table_of(result: Estimate, title: str) -> Table:
    """Return a table of what the ranks have."""
    table = Table("of a rank", "most", "mean", "", title=title, box=box.SIMPLE_HEAD)
    table.title_justify = "left"
    for column in table.columns[1:3]:
        column.justify = "right"
    for name, values in result.summary().items():
        factor, unit = UNITS.get(name, (2**30, "GiB"))
        digits = 1 if name == "polar_calls" else 3
        numbers = [f"{values[which] / factor:,.{digits}f}" for which in ("max", "mean")]
        what = f"{unit}: {QUANTITIES[name]}" if unit == "GiB" else f"{unit} {QUANTITIES[name]}"
        table.add_row(name.replace("_", " "), *numbers, what.removeprefix(" "))
    return table
