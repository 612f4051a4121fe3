"""A small model with an optimizer by its title, and its steps."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import spectral_dist
from tests.support.weights import give_gradients

OPTIONS: dict[str, dict[str, Any]] = {
    "SUMO": {"rank": 2, "period": 3},
    "POET": {"merge_every": 3},
}


def build(title: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    if title == "POET":
        spectral_dist.poet.convert(model, blocks={"^1$": (2, 2), "^3$": (2, 2)})
    options = {"lr": 0.02, **OPTIONS.get(title, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(spectral_dist, title)(spectral_dist.param_groups(model), **options)
    return model, made


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(model, step)
        optimizer.step()
