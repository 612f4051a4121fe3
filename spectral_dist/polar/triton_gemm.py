"""Products of matrices whose result is symmetric: half the tiles by Triton, each stored twice.

A tile at or below the diagonal is computed in float32 and rounded once; what lies strictly below
the diagonal is stored mirrored, too, so that the result is exactly symmetric. What is not symmetric
in exact arithmetic must not be computed this way: the half above the diagonal is never looked at.

Mirroring makes each rounding error count twice, where of two halves only its symmetric part would.
Even so the errors of Newton-Schulz are torch's within 15% on the whole, on random and on decaying
spectra.
"""

# Triton takes annotations of kernels literally, so they are no strings here

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["gram", "odd_part", "update"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on any device: TRITON_INTERPRET=1."""


class Tiling(NamedTuple):
    """How a program works: its tile of rows x cols, and how much of the sum it takes at a time.

    ``group``: rows of tiles that are worked on together, so that what they share stays in L2.
    """

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    group: int = 8


TILINGS = {6144: Tiling(128, 256, 64, 8, 3), 1025: Tiling(128, 128, 64, 4, 4),
           0: Tiling(64, 64, 64, 4, 4)}  # fmt: skip
"""Smallest side -> the fastest of 5 tilings (of 3 up to 1024), on one H100, Triton 3.6, bf16.

Measured at sides of 1024, 2048, 4096, 6144 and 8192. They are fixed: trying them out would take a
training step's time for each shape, and cannot be done while a CUDA graph is captured.
"""


def gram(x: Tensor, out: Tensor) -> Tensor:
    """Compute X X^T, or X^T X of tall matrices, into ``out``.

    Args:
        x: (k, m, n), float16 or bfloat16, with any strides.
        out: (k, s, s) contiguous, s the short side; it must not overlap x.
    """
    if x.shape[-2] > x.shape[-1]:
        x = x.mT
    return _product(x, x, None, 1.0, 0.0, out)


def odd_part(r: Tensor, b: float, c: float, out: Tensor) -> Tensor:
    """Compute b R + c R^2 into ``out``.

    Args:
        r: (k, s, s), float16 or bfloat16, contiguous and exactly symmetric.
        b: factor of R.
        c: factor of R^2.
        out: (k, s, s) contiguous; it must not overlap r.
    """
    return _product(r, r, r, c, b, out)


def update(r: Tensor, z: Tensor, a: float, out: Tensor) -> Tensor:
    """Compute a R + Z R of matrices that commute into ``out``.

    Args:
        r: (k, s, s), float16 or bfloat16, contiguous and exactly symmetric.
        z: The same, a polynomial of the same matrix, so that the product is symmetric, too.
        a: factor of R.
        out: (k, s, s) contiguous; it must not overlap r or z.
    """
    return _product(z, r, r, 1.0, a, out)


def tiling_for(side: int) -> Tiling:
    """Return the tiling for results of side x side."""
    if INTERPRETED:
        return Tiling(64, 64, 64, 4, 2)
    return next(tiling for smallest, tiling in TILINGS.items() if side >= smallest)


def _product(
    left: Tensor, right: Tensor, addend: Tensor | None, alpha: float, beta: float, out: Tensor
) -> Tensor:
    """Compute alpha left right^T + beta addend into ``out`` by one triangle of tiles."""
    batch, side, inner = left.shape
    if INTERPRETED and left.dtype == torch.bfloat16:
        # the interpreter multiplies the bits of bfloat16 as whole numbers; float32 holds the same
        # values, and the one rounding is torch's
        more = None if addend is None else addend.float()
        return out.copy_(_product(left.float(), right.float(), more, alpha, beta, out.float()))
    tile = tiling_for(side)
    square = max(tile.rows, tile.cols)
    squares = -(-side // square)
    grid = (squares * (squares + 1) // 2 * (square // min(tile.rows, tile.cols)), batch)
    is_tall = left.stride(1) == 1 != left.stride(2)
    operands: list[Any] = [
        _descriptor(x, is_tall, size, tile.inner)
        for x, size in ((left, tile.rows), (right, tile.cols))
    ]
    by_tma = None not in operands
    with torch.cuda.device_of(left):  # Triton launches on the current device
        _triangle[grid](
            *(operands if by_tma else (left, right)), out if addend is None else addend, out,
            alpha, beta, side, inner, *left.stride(), *right.stride(),
            BY_TMA=by_tma, TALL=is_tall, ADD=addend is not None,
            ROWS=tile.rows, COLS=tile.cols, INNER=tile.inner, GROUP=tile.group,
            EVEN=side % square == 0 and inner % tile.inner == 0,
            # numpy 2.4, by which the interpreter computes, has no range of its one-element arrays
            LENGTH=inner if INTERPRETED else None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _descriptor(x: Tensor, is_tall: bool, size: int, inner: int) -> Any:
    """Return X (k, side, inner) as Hopper's copy engine takes it, or None if it cannot.

    Args:
        x: the matrices.
        is_tall: whether their columns are contiguous.
        size: rows of a box.
        inner: columns of a box.
    """
    if is_tall:
        x = x.mT
    batch, count, length = x.shape
    if x.stride(2) != 1 or x.data_ptr() % 16 or x.stride(1) * x.element_size() % 16:
        return None
    # one below another, and the sum of one matrix must not run into the next
    if batch > 1 and (x.stride(0) != count * x.stride(1) or (is_tall and count % inner)):
        return None
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return None
    box = [inner, size] if is_tall else [size, inner]
    return TensorDescriptor(x, [batch * count, length], [x.stride(1), 1], box)


@triton.jit
def _row_of(index):
    """The row of the index-th element of a lower triangle that is counted row by row."""
    row = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    # the root may be off by rounding
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row


@triton.jit
def _tile_of(program, side, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile.

    The triangle is one of squares, each of PARTS tiles. GROUP rows of squares are gone through
    column by column; before row r lie r (r + 1) / 2 squares, whatever the order in the groups.
    """
    SQUARE: tl.constexpr = ROWS if ROWS > COLS else COLS
    PARTS: tl.constexpr = SQUARE // (COLS if ROWS > COLS else ROWS)
    square = program // PARTS
    part = program % PARTS
    top = _row_of(square) // GROUP * GROUP
    rest = square - top * (top + 1) // 2
    height = tl.minimum(GROUP, (side + SQUARE - 1) // SQUARE - top)
    # left of the group's own triangle all columns are full
    corner = tl.maximum(rest - height * top, 0)
    corner_row = _row_of(corner)
    full = rest < height * top
    row = top + tl.where(full, rest % height, corner_row)
    col = tl.where(full, rest // height, top + corner - corner_row * (corner_row + 1) // 2)
    if ROWS > COLS:
        return row * SQUARE, col * SQUARE + part * COLS
    return row * SQUARE + part * ROWS, col * SQUARE


@triton.jit
def _triangle(
    left,
    right,
    addend,
    out,
    alpha,
    beta,
    side,
    inner,
    left_batch,
    left_row,
    left_inner,
    right_batch,
    right_row,
    right_inner,
    BY_TMA: tl.constexpr,
    TALL: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """out = alpha left right^T + beta addend, a tile of it and its mirror image.

    left and right (k, side, inner) with any strides, addend and out (k, side, side) contiguous.
    BY_TMA: left and right are descriptors of their matrices one below another, (k side, inner), or
    (k inner, side) if they are TALL.
    """
    row, col = _tile_of(tl.program_id(0), side, ROWS, COLS, GROUP)
    if row >= side or col >= side:
        return
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    if BY_TMA:
        # what the boxes hold beyond a matrix meets only what is not stored
        start = tl.program_id(1) * (inner if TALL else side)
        for begin in range(0, inner if LENGTH is None else LENGTH, INNER):
            if TALL:
                x = tl.trans(left.load([start + begin, row]))
                y = right.load([start + begin, col])
            else:
                x = left.load([start + row, begin])
                y = tl.trans(right.load([start + col, begin]))
            total = tl.dot(x, y, total)
    else:
        # whole matrices in 64 bits, what lies within a tile in 32
        left += batch * left_batch + row.to(tl.int64) * left_row
        right += batch * right_batch + col.to(tl.int64) * right_row
        steps = tl.arange(0, INNER)
        left_tile = left + rows[:, None] * left_row + steps[None, :] * left_inner
        right_tile = right + steps[:, None] * right_inner + cols[None, :] * right_row
        for begin in range(0, inner if LENGTH is None else LENGTH, INNER):
            if EVEN:
                x = tl.load(left_tile)
                y = tl.load(right_tile)
            else:
                inside = steps < inner - begin
                left_mask = (rows < side - row)[:, None] & inside[None, :]
                right_mask = inside[:, None] & (cols < side - col)[None, :]
                x = tl.load(left_tile, mask=left_mask, other=0.0)
                y = tl.load(right_tile, mask=right_mask, other=0.0)
            total = tl.dot(x, y, total)
            left_tile += INNER * left_inner
            right_tile += INNER * right_inner

    total *= alpha
    below = batch * side * side + row.to(tl.int64) * side + col
    above = batch * side * side + col.to(tl.int64) * side + row
    near = rows[:, None] * side + cols[None, :]
    mirrored = cols[:, None] * side + rows[None, :]
    if ADD:
        if EVEN:
            more = tl.load(addend + below + near)
        else:
            within = (rows < side - row)[:, None] & (cols < side - col)[None, :]
            more = tl.load(addend + below + near, mask=within, other=0.0)
        total += beta * more.to(tl.float32)
    tile = total.to(out.dtype.element_ty)
    if row >= col + COLS:
        # wholly below the diagonal: no mask that changes from element to element, so wide stores
        if EVEN:
            tl.store(out + below + near, tile)
            tl.store(out + above + mirrored, tl.trans(tile))
        else:
            tl.store(out + below + near, tile, mask=(rows < side - row)[:, None])
            tl.store(out + above + mirrored, tl.trans(tile), mask=(rows < side - row)[None, :])
    else:
        lower = (row + rows[:, None] >= col + cols[None, :]) & (rows < side - row)[:, None]
        upper = (row + rows[None, :] > col + cols[:, None]) & (rows < side - row)[None, :]
        tl.store(out + below + near, tile, mask=lower)
        tl.store(out + above + mirrored, tl.trans(tile), mask=upper)
