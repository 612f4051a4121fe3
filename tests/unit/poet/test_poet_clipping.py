"""The factor that clipping has after a merge of POET."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import poet
from spectral_dist.poet.optimizer import clip_ramp_factor
from tests.reference import poet as reference
from tests.unit.poet.small_runs import made, train


def test_clip_factor_ramps_up_after_each_merge_but_the_start():
    model, optimizer = made(clip_ramp=3)
    found = []
    for step in range(9):
        found.append(optimizer.clip_factor())
        train(model, optimizer, 1, step)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.4, 0.7, 1, 0.1])
    model, optimizer = made()
    train(model, optimizer, 5)
    assert optimizer.clip_factor() == 1.0


@pytest.mark.parametrize(
    ("since", "ramp", "merged", "expected"),
    [(0, 4, True, 0.1), (1, 4, True, 0.325), (3, 4, True, 0.775), (4, 4, True, 1), (9, 4, True, 1),
     (0, 4, False, 1), (3, 4, False, 1), (0, 0, True, 1)],
)  # fmt: skip
def test_clip_ramp_factor(since, ramp, merged, expected):
    assert clip_ramp_factor(since, ramp, merged) == pytest.approx(expected)


def factors(model, optimizer, steps, start=0):
    """Return the factor of each step, asked for before it."""
    asked = []
    for step in range(start, start + steps):
        asked.append(optimizer.clip_factor())
        train(model, optimizer, 1, step)
    return asked


def test_no_ramp_in_the_first_cycle_of_a_new_optimizer_of_a_merged_model():
    """A run begins with a ramp, and each merge has one, in a resumed run as well."""
    model, optimizer = made(clip_ramp=3)
    factors(model, optimizer, 6)
    again, fresh = made(clip_ramp=3)
    again.load_state_dict(model.state_dict())
    assert fresh.layers[0].merges == 1
    assert factors(again, fresh, 1, 6) == [1]
    saved, resumed = made(clip_ramp=3)
    saved.load_state_dict(again.state_dict())
    resumed.load_state_dict(fresh.state_dict())
    expected = [1, 1, 1, 0.1, 0.4, 0.7, 1, 0.1]
    assert factors(again, fresh, 8, 7) == pytest.approx(expected)
    assert factors(saved, resumed, 8, 7) == pytest.approx(expected)


def test_a_run_resumed_after_a_merge_ramps_as_if_never_stopped():
    model, optimizer = made(clip_ramp=3)
    factors(model, optimizer, 5)
    again, resumed = made(clip_ramp=3)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert factors(again, resumed, 4, 5) == pytest.approx([0.4, 0.7, 1, 0.1])


def test_the_ramp_of_a_model_of_which_only_rotations_train():
    """Nothing counts all steps; the model's merges do."""
    torch.manual_seed(0)
    model = poet.convert(
        nn.Sequential(nn.Linear(8, 10, bias=False)).double(), block=2, matrices=["0"]
    )
    optimizer = spectral_dist.POET(
        spectral_dist.param_groups(model), **{**reference.OPTIONS, "clip_ramp": 3}
    )
    assert factors(model, optimizer, 6) == pytest.approx([1, 1, 1, 1, 0.1, 0.4])


def test_a_ramp_that_nobody_asks_for_warns_once():
    model, optimizer = made(clip_ramp=3)
    train(model, optimizer, 4)
    with pytest.warns(UserWarning, match="clip_factor"):
        train(model, optimizer, 1, 4)
    train(model, optimizer, 6, 5)
