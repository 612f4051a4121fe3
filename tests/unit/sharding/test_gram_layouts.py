"""Any layout reaches its slabs and returns, as strategy ``gram`` sends it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.sharding import collectives
from spectral_dist.sharding.boxes import Box, intersect, slabs
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.exchange import Exchange, MatrixTask
from spectral_dist.sharding.gram import fold, unfold
from spectral_dist.sharding.layout import Cut, Tile
from spectral_dist.sharding.plan import make_plan
from tests.reference.layouts import UNTOUCHED, random_world
from tests.support import harness, sharded_model


class Task(MatrixTask):
    """What must arrive in every slab, and something that comes back misplaced if it does."""

    def __init__(self, world, exchange, ranks, rank):
        self.world, self.ranks, self.rank = world, ranks, rank
        self.inputs = exchange.local_runs.views(world.mine)
        self.outputs = [torch.full_like(t, UNTOUCHED) for t in world.mine]
        self.targets = exchange.local_runs.views(self.outputs)
        self.seen = 0

    def update_input(self, pieces):
        return [self.inputs[piece] for piece in pieces]

    def direction(self, matrices, which):
        assert all(len(self.world.layouts[i].holders()) == 1 for i in which)
        return matrices + 1

    def slab_direction(self, x, reduction):
        for k, i in enumerate(reduction.matrices):
            box = slabs(self.world.layouts[i], self.ranks).box(self.rank, reduction.shape)
            whole = self.world.truths[i].whole
            there = whole[box.row : box.row + box.rows, box.col : box.col + box.cols]
            assert torch.equal(x[k], there)
        self.seen += len(reduction.matrices)
        return x + 1

    def apply(self, pieces, directions):
        for piece, part in zip(pieces, directions, strict=True):
            self.targets[piece].copy_(part)


def there_and_back(ranks, replicas, seed):
    moved = 0
    for count in range(30):
        group, copies = sharded_model.grid(ranks, replicas)
        rank = collectives.rank(group)
        world = random_world(seed + count, ranks, rank, largest=1 << 20)
        numel = (1, 200, 1 << 30)[count % 3]
        plan = make_plan(world.layouts, ranks, numel, replicas, gram=[True] * len(world.layouts))
        cut = [len(x.holders()) > 1 for x in world.layouts]
        assert plan.strategies == tuple("gram" if c else "local" for c in cut)
        exchange = Exchange(
            world.layouts, plan, group=group, replicas=copies, device=torch.device("cpu"),
            like=torch.empty(0), wire_dtype=torch.float32, meter=Meter(),
        )  # fmt: skip
        task = Task(world, exchange, ranks, rank)
        exchange.run(task)
        replica = collectives.rank(copies)
        mine = [o // ranks == replica and c for o, c in zip(plan.owners, cut, strict=True)]
        assert task.seen == sum(mine)
        for truth in world.truths:
            truth.direction.copy_(truth.whole + 1)
        for out, wanted in zip(task.outputs, world.expected(), strict=True):
            assert torch.equal(out, wanted)
        moved += task.seen
    return moved


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_any_layout_reaches_its_slabs_and_returns(ranks, replicas):
    assert sum(harness.run(ranks * replicas, there_and_back, ranks, replicas, 40)) > 20


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_run_of_a_tile_meets_a_box_in_at_most_three(rows, cols, data):
    tile = Tile(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)), rows, cols, Cut((0,)),
                0)  # fmt: skip
    begin, end = sorted(data.draw(st.integers(0, rows * cols)) for _ in range(2))
    box = Box(*(data.draw(st.integers(0, 6)) for _ in range(4)))
    found = list(intersect(tile, begin, end, box))
    assert len(found) <= 3
    cells = [(b.row + i, b.col + j) for b in found for i in range(b.rows) for j in range(b.cols)]
    run = [(tile.row + e // cols, tile.col + e % cols) for e in range(begin, end)]
    inside = [
        (r, c)
        for r, c in run
        if box.row <= r < box.row + box.rows and box.col <= c < box.col + box.cols
    ]
    assert cells == inside


@pytest.mark.parametrize(
    ("parts", "shape", "along", "ranges", "in_place"),
    [
        (
            sharded_model.strips((4, 12), 3, 1, [0, 5, 5, 12]),
            (4, 12),
            1,
            ((0, 5), (0, 0), (5, 12)),
            True,
        ),
        (
            sharded_model.strips((12, 4), 3, 0, [0, 1, 9, 12]),
            (12, 4),
            0,
            ((0, 1), (1, 9), (9, 12)),
            True,
        ),
        (sharded_model.strips((4, 12), 2, 1, groups=2), (4, 12), 1, ((0, 6), (6, 12)), True),
        (sharded_model.strips((6, 6), 2, 0), (6, 6), 0, ((0, 3), (3, 6)), True),
        (sharded_model.strips((6, 6), 2, 1), (6, 6), 1, ((0, 3), (3, 6)), True),
        (sharded_model.strips((4, 12), 3, 0), (4, 12), 1, ((0, 4), (4, 8), (8, 12)), False),
        (sharded_model.strips((7, 4), 2, 1), (7, 4), 0, ((0, 3), (3, 7)), False),
        (sharded_model.flat((4, 12), 3), (4, 12), 1, ((0, 4), (4, 8), (8, 12)), False),
        # runs that are whole rows lie still, whoever cut them
        ([sharded_model.Part(0, 0, 6, 2, (0, 4, 12), (1, 0))], (6, 2), 0, ((2, 6), (0, 2)), True),
    ],
)
def test_slabs_are_as_the_matrix_lies_if_it_can_be(parts, shape, along, ranges, in_place):
    found = slabs(sharded_model.layout("w", parts, shape, 0, 0), len(ranges))
    assert (found.along, found.ranges, found.in_place) == (along, ranges, in_place)


def test_halves_of_symmetric_matrices():
    for s in range(1, 9):
        r = torch.randn(3, s, s)
        r = r + r.mT
        half = fold(r)
        assert half.shape == (3, s * (s + 1) // 2)
        assert torch.equal(half.sort().values[0], r[0][torch.ones(s, s).triu() > 0].sort().values)
        assert torch.equal(unfold(half, s), r)
