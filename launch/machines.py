"""Machines of `configs/machines`, by name."""

from __future__ import annotations

import json
from pathlib import Path

from spectral_dist._errors import suggest
from spectral_dist.launch.shipped import CONFIGS
from spectral_dist.machine import Machine

MACHINES = CONFIGS / "machines"


def names() -> list[str]:
    """Return the names of the machines that are shipped."""
    return sorted(path.stem for path in MACHINES.glob("*.json"))


def load(name: str) -> Machine:
    """Return a machine.

    Args:
        name: of a shipped machine, or the path of a JSON of one's own: an object with the numbers
            that differ from ``Machine``'s defaults, and a text "about", if one likes.

    Raises:
        ValueError: there is no such name or file, or a number in it is wrong.
    """
    path = Path(name) if name.endswith(".json") else MACHINES / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = suggest(name, names())
        raise ValueError(f"machine is {name!r}, no JSON that can be read{known}") from None
    except ValueError as error:
        raise ValueError(f"in machine {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"machine {path} is no object; write an object of numbers by name")
    values.pop("about", None)
    try:
        return Machine.from_user(values)
    except ValueError as error:
        raise ValueError(f"in machine {path}: {error}") from None
