"""Seconds that one rank takes to set up a large job: its layouts, the plan, its own routes.

    .venv/bin/python -m benchmarks.plan_scale
    .venv/bin/python -m benchmarks.plan_scale --ranks 16384 --cuts fsdp --strategies gram

560 matrices, of the shapes of a Llama of 80 layers with 70e9 parameters, in this process alone: no
collective is called. Cuts: ``zero``, one flat buffer in even runs; ``fsdp``, each matrix by rows;
``tp``, tiles on 8 tensor-parallel ranks, each in flat runs over the data-parallel ones, as
Megatron's distributed optimizer has them. The rank is one that stores something. ``auto`` and
``block`` are for tiles alone. FSDP's boxes are made before the clock starts, once for each shape,
as integrations/fsdp.py has them. CPU seconds, each line in a process of its own: nothing is cached.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from multiprocessing import get_context

from spectral_dist.sharding.boxes import block_layouts
from spectral_dist.sharding.bucket_routes import route_to_owners
from spectral_dist.sharding.cost import CostContext, Machine, cheaper_in_slabs
from spectral_dist.sharding.layout import Cut, Layout, StackBoxes, Tile, flat_layout, grid_layout
from spectral_dist.sharding.matrix import Matrix
from spectral_dist.sharding.plan import make_plan
from spectral_dist.sharding.slabs import route_to_slabs

LAYERS, WIDTH, INNER, HEADS = 80, 8192, 28672, 1024
SHAPES = LAYERS * [
    *((WIDTH, WIDTH), (HEADS, WIDTH), (HEADS, WIDTH), (WIDTH, WIDTH)),
    *((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)),
]
TENSOR = 8
BUCKET = 32 << 20
"""elements: the default 64 MB, in bfloat16"""
STRATEGIES = {
    "zero": ("owner", "gram"),
    "fsdp": ("owner", "gram"),
    "tp": ("owner", "gram", "auto", "block"),
}


def matrices() -> list[Matrix]:
    """Return the model's matrices, each a parameter of its own."""
    return [Matrix(f"layer.{i}.weight", s, ((0, s[0]),)) for i, s in enumerate(SHAPES)]


def zero(ranks: int) -> Callable[[], list[Layout]]:
    """Return what lays the matrices one after the other in a flat buffer."""

    def layouts() -> list[Layout]:
        cut = Cut.even(-(-sum(m * n for m, n in SHAPES) // ranks), ranks)
        laid, offset = [], 0
        for matrix in matrices():
            laid.append(flat_layout(matrix, cut, offset=offset))
            offset += matrix.numel
        return laid

    return layouts


def fsdp(ranks: int) -> Callable[[], list[Layout]]:
    """Return what cuts each matrix by rows, as torch.chunk does."""
    boxes = {}
    for m, n in set(SHAPES):
        chunk = -(-m // ranks)
        edges = [min(m, r * chunk) for r in range(ranks + 1)]
        boxes[m, n] = StackBoxes(((0, 1), (edges[r], edges[r + 1]), (0, n)) for r in range(ranks))

    def layouts() -> list[Layout]:
        return [
            grid_layout(matrix, matrix.numel, boxes[matrix.shape], ranks // 32, i)
            for i, matrix in enumerate(matrices())
        ]

    return layouts


def tp(ranks: int) -> Callable[[], list[Layout]]:
    """Return what cuts each matrix over tensor-parallel ranks, and those over the others.

    Wide matrices by columns, the others by rows; rank t * data + d is (t, d). The runs of a flat
    buffer of each tensor-parallel rank, which end where it does.
    """
    data = ranks // TENSOR

    def layouts() -> list[Layout]:
        share = -(-sum(m * n for m, n in SHAPES) // TENSOR // data)
        laid, start = [], 0
        for i, matrix in enumerate(matrices()):
            (m, n), numel = matrix.shape, matrix.numel // TENSOR
            first, last = start // share, -(-(start + numel) // share)
            bounds = tuple(min(max(d * share - start, 0), numel) for d in range(first, last + 1))
            tiles = []
            for t in range(TENSOR):
                cut = Cut(bounds, tuple(range(t * data + first, t * data + last)))
                rows, cols = (m, n // TENSOR) if n > m else (m // TENSOR, n)
                row, col = (0, t * cols) if n > m else (t * rows, 0)
                tiles.append(Tile(row, col, rows, cols, cut, 0, 0, i, block=t))
            laid.append(Layout(matrix, tuple(tiles)))
            start += numel
        return laid

    return layouts


CUTS = {"zero": zero, "fsdp": fsdp, "tp": tp}


def set_up(layouts: Sequence[Layout], strategy: str, ranks: int) -> tuple[float, float]:
    """Return the seconds of the plan and of one rank's routes."""
    begin = time.process_time()
    gram = [strategy == "gram"] * len(layouts)
    if strategy == "auto":
        job = CostContext(ranks, 1, 5, 2, True, 4)
        gram = cheaper_in_slabs(layouts, [True] * len(layouts), job, Machine())
    plan = make_plan(layouts, ranks, BUCKET, gram=gram)
    if strategy == "block":
        layouts = [block for layout in layouts for block in block_layouts(layout)]
        plan = make_plan(layouts, ranks, BUCKET, required_replicas=[0] * len(layouts))
    lines = [layout.describe() for layout in layouts] + [str(bucket) for bucket in plan.buckets]
    hashlib.sha256("\n".join(lines).encode()).digest()  # what ranks compare
    planned = time.process_time()
    routes = []  # kept, as an exchange keeps them
    rank = ranks // 32  # of every matrix it has a part
    for bucket in plan.buckets:
        here = (bucket, layouts, rank, ranks, 0, 1)
        routes.append(route_to_slabs(*here)[0] if bucket.gram else route_to_owners(*here))
    return planned - begin, time.process_time() - planned


def line(ranks: int, cut: str, strategy: str) -> None:
    """Print what one set-up takes, in a process that has done no other."""
    make = CUTS[cut](ranks)
    begin = time.process_time()
    layouts = make()
    laid = time.process_time() - begin
    planned, routed = set_up(layouts, strategy, ranks)
    seconds = (laid, planned, routed, laid + planned + routed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak //= 1 << (20 if sys.platform == "darwin" else 10)
    columns = "".join(f"{s:9.2f}" for s in seconds)
    print(f"{ranks:6} {cut:4} {strategy:8}{columns}{peak:9}", flush=True)


def main() -> None:
    """Print a line for each number of ranks, cut and strategy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 2048, 16384])
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--strategies", nargs="+", default=["owner", "gram", "auto", "block"])
    arguments = parser.parse_args()
    print(f"{'ranks':>6} cut  strategy  layouts     plan   routes      all  CPU seconds; peak MB")
    gc.collect()
    gc.freeze()  # going through all of torch's objects is no part of this
    for case in product(arguments.ranks, arguments.cuts, arguments.strategies):
        if case[2] in STRATEGIES[case[1]]:
            process = get_context("fork").Process(target=line, args=case)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
