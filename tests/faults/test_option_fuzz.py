"""Every option of every optimizer takes any value: it works, or is one line that names the option.

The values come from hypothesis and from a list of those that people write by mistake; the options
from the registry, so that a new rule's are among them.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spectral_dist
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of

CASES = [(entry.title, name) for entry in registry.entries() for name in specs_of(entry.options)]
TOO_LONG = 50
"""Above it a whole number may ask for a loop of hours: such values are checked, but not run."""
MISTAKES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 0.5, 1.5, -0.0, math.nan, math.inf, -math.inf, 1e308, 10**30,
    "", "x", "0.9", "1e-3", "none", [], [1], [0.9, 0.95], [0.9, "0.95"], [[1]], (), (0.5,), {},
    {"a": 1}, {1: 2}, {"coefficients": []}, object(), 1j, b"x", torch.tensor(0.5), torch.ones(2),
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def model_for(title: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5))
    if title == "POET":
        spectral_dist.poet.convert(model, block=2, blocks={"^3$": [2, 5]})
    return model


def optimizer_of(title: str, model: nn.Module, **options: Any) -> Any:
    return getattr(spectral_dist, title)(spectral_dist.param_groups(model), **options)


def take_step(model: nn.Module, optimizer: Any) -> None:
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()


def bits(model: nn.Module, optimizer: Any) -> list[Tensor]:
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*model.parameters(), *states)]


def runs_long(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(runs_long, value.values()))
    if isinstance(value, list | tuple):
        return any(map(runs_long, value))
    return isinstance(value, int | float) and abs(value) > TOO_LONG


def told(error: ValueError, name: str) -> None:
    assert name in str(error), error
    assert "\n" not in str(error), error


def construct_and_step(title: str, name: str, value: object) -> None:
    model = model_for(title)
    try:
        optimizer = optimizer_of(title, model, **{name: value})
    except ValueError as error:
        told(error, name)
        return
    if runs_long(value):
        return
    try:
        take_step(model, optimizer)
    except ValueError as error:  # what cannot be known before the shapes are
        told(error, name)


def write_and_step(title: str, name: str, value: object) -> None:
    """Write as a scheduler does, after a good step; an error leaves everything as it was."""
    model = model_for(title)
    optimizer = optimizer_of(title, model)
    take_step(model, optimizer)
    carrying = [group for group in optimizer.param_groups if name in group]
    if not carrying or runs_long(value):
        return
    for group in carrying:
        group[name] = value
    before = bits(model, optimizer)
    try:
        take_step(model, optimizer)
    except ValueError as error:
        told(error, name)
        after = bits(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("title", sorted({title for title, _ in CASES}))
@pytest.mark.fast_cases("Muon")
def test_mistakes(title: str) -> None:
    for name in (name for owner, name in CASES if owner == title):
        for value in MISTAKES:
            construct_and_step(title, name, value)
            write_and_step(title, name, copy.copy(value))


@settings(max_examples=400)
@given(case=st.sampled_from(CASES), value=VALUES)
@pytest.mark.slow
def test_anything(case: tuple[str, str], value: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        construct_and_step(*case, value)


@settings(max_examples=200)
@given(case=st.sampled_from(CASES), value=VALUES)
def test_anything_that_a_scheduler_writes(case: tuple[str, str], value: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_and_step(*case, value)
