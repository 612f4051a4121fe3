"""What an optimizer must keep on a rank, to the byte, and what its step may take for a moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
"""of parameters, by name"""
FLOAT = 4  # bytes of a float32


def parts(shapes: Shapes, layout: str, rank: int, world: int) -> list[int]:
    """Elements of each tensor that the optimizer of a rank steps on, for parameters of one group.

    FSDP2 cuts rows as torch.chunk does: ceil(rows / world) to each rank until none are left. ZeRO 1
    and 2 cut one flat tensor of all, padded to a multiple of 2 x world; ZeRO 3 each parameter,
    padded to a multiple of world, and steps on one tensor of all the pieces.
    """
    numels = [math.prod(shape) for shape in shapes.values()]
    if layout in ("ddp", "zero0"):
        return numels
    if layout == "fsdp":
        cut = []
        for shape, numel in zip(shapes.values(), numels, strict=True):
            share = -(-shape[0] // world)
            rows = max(0, min(shape[0] - rank * share, share))
            cut.append(rows * numel // shape[0])
        return cut
    if layout == "zero3":
        return [sum(-(-numel // world) for numel in numels)]
    return [-(-sum(numels) // (2 * world)) * 2]


def gradients(shapes: Shapes, layout: str, rank: int, world: int) -> int:
    """Bytes of the gradients that the rank's step gets, for parameters of one group."""
    return FLOAT * sum(parts(shapes, layout, rank, world))


def reduced(shapes: Shapes, layout: str, world: int) -> int:
    """Bytes that a rank hands to the reduction of gradients in a step, of all that is trained.

    FSDP2 pads the rows of each tensor to a multiple of the ranks, and reduces nothing on one alone.
    """
    if layout == "fsdp":
        return (world > 1) * FLOAT * world * sum(parts(shapes, layout, 0, world))
    return FLOAT * sum(map(math.prod, shapes.values()))


def adamw_state(shapes: Shapes, layout: str, rank: int, world: int) -> int:
    """Bytes: two moments of what the rank steps on, and a float32 step count of each tensor."""
    found = parts(shapes, layout, rank, world)
    return FLOAT * (2 * sum(found) + len(found))


def matrix_state(
    optimizer: str,
    shapes: Shapes,
    layout: str,
    rank: int,
    world: int,
    owned: Iterable[str],
    r: int,
) -> int:
    """Bytes of the state of matrices. ``owned``: those that the rank is the owner of; r: SUMO's.

    One number where AdamW has two, the momentum: of what the rank steps on, but under DDP of the
    matrices it owns. SUMO keeps r (m + n) numbers of those instead, whatever the layout, and of
    each a float64 norm and an int64 step count. A step count of each tensor have all. POET's are
    Adam's, of the skew parameters that stand in for matrices.
    """
    if optimizer in ("adamw", "poet"):  # of skew parameters, as of any others
        return adamw_state(shapes, layout, rank, world)
    found = parts(shapes, layout, rank, world)
    kept, own = sum(found), [shapes[name] for name in owned]
    if optimizer == "sumo":
        kept = sum(4 + (r * (m + n) if r < min(m, n) else m * n) for m, n in own)
    elif layout == "ddp":
        kept = sum(m * n for m, n in own)
    return FLOAT * (kept + len(found))


def _columns(short: int, r: int) -> float:
    """Of SUMO's sketch, over those of the matrix."""
    return min(1.0, (r + 8) / short)


RULES: dict[str, Callable[[int, int], float]] = {
    # Grams are of the short side, so at most as large as the matrix
    "muon": lambda short, r: 4,  # scaled, work space, two Grams
    "root": lambda short, r: 5,  # clamped; Muon's
    # scaled, W, [W; I] and its Q twice as large, R: where no QR of the long side comes first
    "polargrad": lambda short, r: 7,
    # on a GPU, in float64: scaled, its Gram, and three more of the polynomial
    "polargrad by products": lambda short, r: 11,
    "sumo": lambda short, r: 2 + r / short,  # D before and after a term, Q^T G
    # G; the sketch, and in float64 itself twice and Grams of it
    "sumo refresh": lambda short, r: 1 + 7 * _columns(short, r),
}
"""What a rule has at once, with the result, over the matrices in hand: (short side, r) -> times."""


def step_peak(rule: str, buckets: Mapping[str, int], copies: int, short: int, r: int) -> float:
    """Bound of the temporary elements of a step, whatever the number of matrices.

    A bucket is exchanged while the one before is computed and the one before that returns, so three
    are there at once. ``buckets`` has the most elements that this rank has of one:

    - the youngest: what the rank gives, and if the bucket moves what it takes;
    - the one in hand: what it took (kept until the bucket's way ends), the same in the order of
      matrices, and the matrices in hand: on CPUs one at a time, a copy and what the rule has of it,
      on GPUs all of the bucket and no copy;
    - the oldest: what it took, and directions, as they return and if it moves as they were sent.

    Where shards have ``copies`` (DDP, ZeRO 0) a fourth spreads its directions: beside what the
    oldest has, these padded, as sent, and everyone's. When weights are changed with those, they are
    there as they arrived, in one piece, and scaled, and everyone's of the bucket behind it too.
    """
    gives, takes, moves = buckets["gives"], buckets["takes"], buckets["moves"]
    youngest = gives + moves * takes
    in_hand = (2 + 1 + RULES[rule](short, r)) * takes
    oldest = takes + gives + moves * takes
    if copies == 1:
        return youngest + in_hand + oldest
    spreading = takes + 2 * gives + buckets["returns"]
    changing = takes + gives + 3 * buckets["returns"]
    return max(youngest + in_hand + oldest + spreading, youngest + oldest + spreading + changing)
