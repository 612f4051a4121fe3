"""How one weight holds several matrices: equal parts, listed rows, stacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from spectral_dist.sharding.layout import Matrix

Split: TypeAlias = int | list[int]
"""Equal parts, or the rows of each part."""


def _row_parts(rows: int, split: Split, where: str) -> list[list[tuple[int, int]]]:
    """For each part of a split, its (first row, rows) blocks.

    An int is that many equal parts. A list is the rows of each part; if they sum to a divisor of
    ``rows``, the pattern repeats, as in QKV weights stored per query group.
    """
    if isinstance(split, bool) or not isinstance(split, int | list | tuple):
        raise ValueError(
            f"split {where}: {split!r} is neither a number of parts nor a list of rows"
        )
    if isinstance(split, list | tuple) and not all(type(part) is int for part in split):
        raise ValueError(f"split {where}: {split!r} must list whole numbers of rows")
    if isinstance(split, int):
        if split < 1 or rows % split:
            raise ValueError(f"split {where}: {rows} rows cannot be cut into {split} equal parts")
        split = [rows // split] * split
    period = sum(split)
    if not split or min(split) < 1 or rows % period:
        raise ValueError(
            f"split {where}: parts of {split} rows sum to {period}, but the weight has {rows} rows;"
            " the sum must be the rows or divide them"
        )
    parts: list[list[tuple[int, int]]] = []
    start = 0
    for part in split:
        parts.append([(group * period + start, part) for group in range(rows // period)])
        start += part
    return parts


def matrices_of(
    name: str, shape: Sequence[int], split: Split | None, transposed: bool = False
) -> tuple[Matrix, ...]:
    """The matrices of a parameter: itself, each of a 3-D stack, or the parts of a split of those.

    Anything beyond three dimensions, and convolutions, are out x (the rest). ``transposed``: of a
    parameter that is stored in x out.
    """
    count, m, n = shape if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
    parts = [[(0, m)]] if split is None else _row_parts(m, split, f"of {name}")
    found = []
    for k in range(count):
        stack = f"{name}[{k}]" if len(shape) == 3 else name
        for j, blocks in enumerate(parts):
            part = stack if split is None else f"{stack}/{j}"
            rows = sum(r for _, r in blocks)
            places = tuple((k * m * n + row * n, r) for row, r in blocks)
            found.append(Matrix(part, (rows, n), places, transposed))
    return tuple(found)
