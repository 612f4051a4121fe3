"""The data order is a function of seed, step and batch size."""

import numpy as np
import pytest
import torch

from spectral_dist.launch.batches import Windows, rank_micro_batches, window_indices


def test_an_epoch_visits_every_window_once() -> None:
    steps = [window_indices(step, 4, 20, seed=1) for step in range(10)]
    first, second = np.concatenate(steps[:5]), np.concatenate(steps[5:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()
    assert window_indices(0, 4, 20, seed=2).tolist() != steps[0].tolist()


def test_a_step_does_not_depend_on_those_before() -> None:
    in_order = [window_indices(step, 6, 20, seed=3).tolist() for step in range(12)]
    backwards = [window_indices(step, 6, 20, seed=3).tolist() for step in reversed(range(12))]
    assert in_order == backwards[::-1]


def test_the_order_is_frozen() -> None:
    # Runs resumed with a newer numpy must see the same data.
    assert window_indices(1, 4, 10, seed=7).tolist() == FROZEN


FROZEN = [6, 9, 4, 3]


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 3), (2, 3), (3, 2), (4, 1)])
def test_ranks_share_a_step_without_gap_or_overlap(world: int, micro: int) -> None:
    rows = torch.arange(24).view(12, 2)
    shares = [rank_micro_batches(rows, micro, rank, world) for rank in range(world)]
    assert len({len(parts) for parts in shares}) == 1
    assert all(len(part) == micro for parts in shares for part in parts)
    seen = sorted(int(row[0]) for parts in shares for part in parts for row in part)
    assert seen == rows[:, 0].tolist()


def test_windows_meet_without_losing_a_target() -> None:
    tokens = np.arange(100, 122, dtype=np.uint16)
    windows = Windows(tokens, 5, "training")
    assert windows.count == 4
    rows = windows.rows(np.arange(4))
    assert rows[:, 1:].flatten().tolist() == list(range(101, 121))
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    with pytest.raises(ValueError, match=r"training text has 22 tokens: too few .* of 22"):
        Windows(tokens, 22, "training")
