"""Learning rates and other numbers as torch.optim.AdamW takes them, and those that nobody takes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import spectral_dist
from spectral_dist.rules import registry
from tests.support.weights import give_gradients, same, values
from tests.unit.core.trained import build, train

TITLES = [entry.title for entry in registry.entries()]
NUMBERS: dict[str, Any] = {
    "tensor": torch.tensor(0.03125),
    "tensor of one": torch.tensor([0.03125]),
    "double tensor": torch.tensor(0.03125, dtype=torch.float64),
    "float32": numpy.float32(0.03125),
    "float64": numpy.float64(0.03125),
    "float16": numpy.float16(0.03125),
}
WHOLE: dict[str, Any] = {
    "int": 1,
    "numpy int": numpy.int64(1),
    "tensor of int": torch.tensor(1),
}


def built(title: str, lr: Any, **options: Any) -> tuple[nn.Module, Any]:
    model, _ = build(title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = spectral_dist.param_groups(model)
        return model, getattr(spectral_dist, title)(groups, lr=lr, **options)


@pytest.mark.parametrize("name", [*NUMBERS, *WHOLE])
@pytest.mark.parametrize("title", ["Muon", "SUMO", "POET"])
def test_every_number_that_adamw_takes(title: str, name: str) -> None:
    """Given to the optimizer, and written into its groups."""
    lr = {**NUMBERS, **WHOLE}[name]
    torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=lr)
    wanted, optimizer = built(title, float(lr))
    train(wanted, optimizer, 0, 2)
    model, optimizer = built(title, lr)
    train(model, optimizer, 0, 2)
    assert same(values(model), values(wanted))
    model, optimizer = built(title, 0.5)
    for group in optimizer.param_groups:
        group["lr"] = lr
    train(model, optimizer, 0, 2)
    assert same(values(model), values(wanted))


def test_a_tensor_is_read_in_every_step() -> None:
    """As by torch's optimizers: who has it may write into it, and schedulers do."""
    lr = torch.tensor(0.0)
    model, optimizer = built("Muon", lr, weight_decay=0.0)
    before = values(model)
    train(model, optimizer, 0, 1)
    assert same(values(model), before)
    lr.fill_(0.5)
    train(model, optimizer, 1, 2)
    assert not same(values(model), before)
    first, _ = built("Muon", torch.tensor(0.5))
    second, _ = built("Muon", 0.5)
    for model, value in ((first, torch.tensor(0.5)), (second, 0.5)):
        optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), lr=value)
        schedule = CosineAnnealingLR(optimizer, 6)
        for step in range(4):
            train(model, optimizer, step, step + 1)
            schedule.step()
    for mine, wanted in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)  # float32's learning rates


def test_other_numbers_of_numpy() -> None:
    given = {
        "momentum": numpy.float64(0.5), "weight_decay": numpy.float32(0.25),
        "betas": (numpy.float32(0.5), numpy.float64(0.75)), "eps": numpy.float64(1e-3),
        "polar_steps": numpy.int64(3), "bucket_mb": numpy.float32(1.0),
    }  # fmt: skip
    plain = {
        "momentum": 0.5, "weight_decay": 0.25, "betas": (0.5, 0.75), "eps": 1e-3,
        "polar_steps": 3, "bucket_mb": 1.0,
    }  # fmt: skip
    made = []
    for options in (given, plain):
        model, optimizer = built("Muon", 0.03125, **options)
        train(model, optimizer, 0, 2)
        made.append((values(model), optimizer.param_groups, optimizer.options))
    assert same(made[0][0], made[1][0])
    assert made[0][2] == made[1][2]
    for mine, theirs in zip(made[0][1], made[1][1], strict=True):
        left_out = {"params"}
        pairs = [(mine[k], theirs[k]) for k in mine.keys() - left_out]
        assert all(a == b and type(a) is type(b) for a, b in pairs)
    model, optimizer = built("Muon", 0.03125, **plain)
    for group in optimizer.param_groups:  # as a scheduler of the user's own may write them
        group.update({k: v for k, v in given.items() if k in group and k != "polar_steps"})
    train(model, optimizer, 0, 2)
    assert same(values(model), made[1][0])


BAD = [
    math.nan, math.inf, -1.0, "0.1", None, True, [0.1], 1j, torch.tensor(1j), torch.ones(2),
    torch.tensor(math.nan), numpy.float32(-1), numpy.array([0.1, 0.2]),
]  # fmt: skip


@pytest.mark.parametrize("lr", BAD, ids=str)
@pytest.mark.parametrize("title", TITLES)
def test_what_a_scheduler_must_not_write(title: str, lr: Any) -> None:
    """In the last group, so that the first would have been stepped on."""
    model, optimizer = built(title, 0.03125)
    train(model, optimizer, 0, 1)
    before, states = values(model), [dict(s) for s in optimizer.state.values()]
    states = [{k: v.clone() for k, v in state.items()} for state in states]
    good, optimizer.param_groups[-1]["lr"] = optimizer.param_groups[-1]["lr"], lr
    give_gradients(model, 1)
    with pytest.raises(ValueError, match=r"a parameter group: lr is "):
        optimizer.step()
    assert same(values(model), before)
    for mine, theirs in zip(optimizer.state.values(), states, strict=True):
        assert same(mine, theirs)
    optimizer.param_groups[-1]["lr"] = good
    optimizer.step()
    wanted, optimizer = built(title, 0.03125)
    train(wanted, optimizer, 0, 2)
    assert same(values(model), values(wanted))


@pytest.mark.parametrize("title", TITLES)
def test_a_step_without_gradients_is_said_once_and_left_out(title: str) -> None:
    """Lightning skips a batch so. Before the first step it may be a stale optimizer: an error."""
    model, optimizer = built(title, 0.03125)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.step()
    schedule = OneCycleLR(optimizer, max_lr=0.05, total_steps=9)
    train(model, optimizer, 0, 1)
    schedule.step()
    before = values(model)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="this step changes nothing"):
        optimizer.step()
    schedule.step()
    for _ in range(3):
        optimizer.step()  # a warning would be an error
        schedule.step()
    assert same(values(model), before)
    train(model, optimizer, 1, 2)
    assert optimizer.steps_taken() == 2
