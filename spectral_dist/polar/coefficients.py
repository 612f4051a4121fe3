"""Coefficients (a, b, c) for each shape of matrix, in a JSON file.

    {"steps": 5, "coefficients": {"512x2048": [a, b, c], ...}, "origin": {...}}

``origin`` says what they were fitted to; see ``spectral_dist.calibrate``, which writes such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spectral_dist.polar.fit import FALLBACK
from spectral_dist.polar.schedules import Row
from spectral_dist.polar.stability import check_fixed

Shape = tuple[int, int]


def key(shape: Sequence[int]) -> str:
    """Return how coefficients of a shape are named: "MINxMAX", whatever the orientation."""
    return f"{min(shape)}x{max(shape)}"


_AGAIN = "; spectral-dist calibrate writes such a file"


def choose(shape: Sequence[int], table: Mapping[Shape, Row] | None = None) -> Row:
    """The row for an (m, n) matrix, in any orientation; FALLBACK if ``table`` has none.

    It is not checked: PUBLISHED has an unstable one. What ``read`` returns is.
    """
    return (table or {}).get((min(shape), max(shape)), FALLBACK)


def read(path: Path | str, steps: int | None = None) -> dict[Shape, Row]:
    """The rows of a coefficients file by (min, max).

    steps: what they will be used for, if known. ValueError: unreadable, malformed or unstable, or
    fitted to another number of steps, naming the file, the shape and the reason.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the coefficients {path}: {error}{_AGAIN}") from None
    if not isinstance(content, dict) or not isinstance(content.get("coefficients"), dict):
        raise ValueError(f'{path}: expected {{"steps": 5, "coefficients": {{...}}}}{_AGAIN}')
    fitted = content.get("steps")
    if isinstance(fitted, bool) or not isinstance(fitted, int) or fitted < 1:
        raise ValueError(f"{path}: steps is {fitted!r}; it must be a whole number, at least 1")
    if steps is not None and steps != fitted:
        raise ValueError(
            f"{path}: its coefficients are for {fitted} steps, not for {steps}; take {fitted}"
            f" steps, or run spectral-dist calibrate --steps {steps}"
        )
    table: dict[Shape, Row] = {}
    for name, row in content["coefficients"].items():
        shape = parse_shape(name, f"{path}: ")
        if key(shape) != name:
            raise ValueError(f"{path}: {name}: write the shorter side first, {key(shape)}")
        check_row(row, f"{path}: {name}")
        table[shape] = (float(row[0]), float(row[1]), float(row[2]))
    return table


def check_row(row: Row, where: str) -> None:
    """Raise a ValueError, which begins with ``where``, for coefficients that are not stable."""
    try:
        check_fixed(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_shape(text: object, where: str = "") -> Shape:
    """(min, max) of a shape written "512x2048". ValueError."""
    parts = text.lower().split("x") if isinstance(text, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{where}{text!r} is no shape; write it as in 512x2048")
    short, long = sorted(int(part) for part in parts)
    if short < 1:
        raise ValueError(f"{where}{text!r}: sides must be at least 1")
    return short, long
