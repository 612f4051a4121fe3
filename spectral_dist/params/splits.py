"""How one weight holds several matrices: equal parts, listed rows (or columns), stacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from spectral_dist.sharding.matrix import Columns, Matrix

Split: TypeAlias = int | list[int]
"""The number of equal parts, or the number of rows of each part."""


Blocks: TypeAlias = list[tuple[int, int]]
"""(first row, number of rows) of each block of rows."""


def _row_parts(rows: int, split: Split, where: str) -> list[Blocks]:
    """Return the blocks of each part of a split.

    Args:
        rows: of the weight, as rules read it.
        split: an int is that many equal parts. A list is the rows of each part; if they sum to a
            divisor of ``rows``, the pattern repeats, as in QKV weights stored per query group.
        where: the words after "split" in errors.

    Raises:
        ValueError: the split does not fit.
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
    parts: list[Blocks] = []
    start = 0
    for part in split:
        parts.append([(group * period + start, part) for group in range(rows // period)])
        start += part
    return parts


def per_head(rows: int, split: Split | None, heads: Sequence[int], where: str) -> list[int]:
    """Return the split that also cuts every part into its heads.

    Args:
        rows: of the weight, as rules read it.
        split: its parts, without their heads; None: it is one part.
        heads: for each part, the rows of each of its heads; 0: it has no heads.
        where: the words after "split" in errors.

    Raises:
        ValueError: the split does not fit, or a part is no whole number of heads.
    """
    parts = [[(0, rows)]] if split is None else _row_parts(rows, split, where)
    pairs = zip(parts, heads, strict=True)
    blocks = sorted((*block, height) for part, height in pairs for block in part)
    result: list[int] = []
    for _, size, height in blocks:
        if height and size % height:
            raise ValueError(
                f"heads: {size} rows {where} are not cut into heads of {height} rows;"
                ' write its parts in split, as in split={"pattern": [64, 64]}'
            )
        result += [height] * (size // height) if height else [size]
    return result


def matrices_of(
    name: str, shape: Sequence[int], split: Split | None, transposed: bool = False
) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter: itself, each of a 3-D stack, or the parts of their split.

    Args:
        name: of the parameter, from which the matrices' names are made: NAME, NAME[k], NAME/j. A
            split of one part leaves the name as it is without a split.
        shape: 2-D; or 3-D for a stack of matrices. More dimensions are read as out x (the rest).
        split: how the rows of each matrix, as rules read it, are divided; None: they are not.
        transposed: whether the parameter is stored (in, out), so that those rows are columns.

    Raises:
        ValueError: the split does not fit.
    """
    count, m, n = shape if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
    parts: list[Blocks | None] = [None]
    if split is not None:
        parts = [*_row_parts(n if transposed else m, split, f"of {name}")]
    matrices = []
    for k in range(count):
        stack = f"{name}[{k}]" if len(shape) == 3 else name
        for j, blocks in enumerate(parts):
            part = stack if len(parts) == 1 else f"{stack}/{j}"
            start = k * m * n
            if blocks is None:
                matrices.append(Matrix(part, (m, n), ((start, m),), transposed))
            elif transposed:
                columns, width = _columns(n, blocks), sum(r for _, r in blocks)
                matrices.append(Matrix(part, (m, width), ((start, m),), True, columns))
            else:
                flat_blocks = tuple((start + row * n, r) for row, r in blocks)
                matrices.append(Matrix(part, (sum(r for _, r in blocks), n), flat_blocks))
    return tuple(matrices)


def _columns(width: int, blocks: Blocks) -> Columns | None:
    """Return the columns of a parameter that a part of its split is; None: all of them."""
    if blocks == [(0, width)]:
        return None
    if len(blocks) > 1 and all(count == 1 for _, count in blocks):  # every k-th one
        return Columns(width, ((blocks[0][0], len(blocks)),), blocks[1][0] - blocks[0][0])
    return Columns(width, tuple(blocks))
