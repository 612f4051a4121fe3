"""What a user sees by help() and inspect.signature() of every optimizer that a rule makes."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import re
import warnings
from dataclasses import fields

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist.rules import registry
from tests.weights import give_gradients, same, values

ENTRIES = {entry.title: entry for entry in registry.builtin_entries()}
OURS = ("params", "process_group", "placement")


@pytest.mark.parametrize("title", ENTRIES)
def test_help(title: str) -> None:
    """The formula of the step, the paper, and a sentence about every argument."""
    text = pydoc.plain(pydoc.render_doc(getattr(spectral_dist, title)))
    assert re.search(r"arXiv \d{4}\.\d{5}|https?://", text)
    assert re.search(r"W <- .*W.* - lr", text)
    for name in (*OURS, *(each.name for each in fields(ENTRIES[title].options))):
        assert re.search(rf"^[ |]+{name}: \S.*\S", text, re.MULTILINE), name


@pytest.mark.parametrize("title", ENTRIES)
def test_signature(title: str) -> None:
    """Every option by keyword, with the default that the optimizer then has."""
    parameters = inspect.signature(getattr(spectral_dist, title)).parameters
    for each in fields(ENTRIES[title].options):
        assert parameters[each.name].default == each.default
        if each.name != "lr":
            assert parameters[each.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters)[:2] == ["params", "lr"]
    assert set(parameters) == {*OURS, *(each.name for each in fields(ENTRIES[title].options))}


@pytest.mark.parametrize("title", ENTRIES)
def test_the_example_runs(title: str) -> None:
    """As it stands, on a model; the optimizer that it leaves takes a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8))
    examples = doctest.DocTestParser().get_examples(getattr(spectral_dist, title).__doc__)
    assert examples
    names = {"model": model, "spectral_dist": spectral_dist}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in examples:
            exec(example.source, names)  # as doctest does, but quietly
    optimizer = names["optimizer"]
    assert isinstance(optimizer, getattr(spectral_dist, title))
    before = values(model)
    give_gradients(model, 0)
    optimizer.step()
    assert not same(before, values(model))
