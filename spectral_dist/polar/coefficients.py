"""Coefficients (a, b, c) for each shape of matrix, in a JSON file.

    {"steps": 5, "coefficients": {"512x2048": [a, b, c], ...}, "origin": {...}}

``origin`` says what the coefficients were fitted to; ``spectral_dist.calibrate`` writes such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spectral_dist._error_help import explained
from spectral_dist.polar.fit import FALLBACK
from spectral_dist.polar.schedules import Row
from spectral_dist.polar.stability import check_fixed

Shape = tuple[int, int]


def key(shape: Sequence[int]) -> str:
    """Return the name of a shape in files and groups: "MINxMAX", whatever the orientation."""
    return f"{min(shape)}x{max(shape)}"


_HINT = "; spectral-dist calibrate writes such a file"


def row_of_shape(shape: Sequence[int], table: Mapping[Shape, Row] | None = None) -> Row:
    """Return the (a, b, c) for an (m, n) matrix in any orientation; FALLBACK if the table has none.

    The row is not checked: PUBLISHED has an unstable one. Rows that ``read`` returns are checked.
    """
    return (table or {}).get((min(shape), max(shape)), FALLBACK)


@explained
def read(path: Path | str, steps: int | None = None) -> dict[Shape, Row]:
    """Read a coefficients file and check every row of it.

    Args:
        path: the JSON file.
        steps: the number of steps that the rows will be used for, if it is known.

    Returns:
        The (a, b, c) by (min, max) side.

    Raises:
        ValueError: the file is unreadable or malformed, or a row is unstable, or the rows were
            fitted to another number of steps. The text names the file, the shape and the reason.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the coefficients {path}: {error}{_HINT}") from None
    if not isinstance(content, dict) or not isinstance(content.get("coefficients"), dict):
        raise ValueError(f'{path}: expected {{"steps": 5, "coefficients": {{...}}}}{_HINT}')
    fitted_steps = content.get("steps")
    if isinstance(fitted_steps, bool) or not isinstance(fitted_steps, int) or fitted_steps < 1:
        raise ValueError(
            f"{path}: steps is {fitted_steps!r}; it must be a whole number, at least 1"
        )
    if steps is not None and steps != fitted_steps:
        raise ValueError(
            f"{path}: its coefficients are for {fitted_steps} steps, not for {steps}; take"
            f" {fitted_steps} steps, or run spectral-dist calibrate --steps {steps}"
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
    """Raise a ValueError, whose text begins with ``where``, for an (a, b, c) that is not stable."""
    try:
        check_fixed(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@explained
def parse_shape(text: object, where: str = "") -> Shape:
    """Return (min, max) of a shape written as "512x2048".

    Raises:
        ValueError: the text is no such shape; the error begins with ``where``.
    """
    parts = text.lower().split("x") if isinstance(text, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{where}{text!r} is no shape; write it as in 512x2048")
    short, long = sorted(int(part) for part in parts)
    if short < 1:
        raise ValueError(f"{where}{text!r}: sides must be at least 1")
    return short, long
