"""A small model that POET trains, its steps, and the same steps of the reference."""

from __future__ import annotations

import torch
from torch import nn

import spectral_dist
from spectral_dist import poet
from tests.reference import poet as reference

BLOCKS = {"0": (4, 3), "2": (6, 5)}


def net(dtype=torch.float64, seed=0):
    """8 -> 12 -> 10, with a norm between, which is a scalar as the biases are."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10)).to(dtype)


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return (torch.tanh(self.model(x)) - y).square().mean()


def batch(step, dtype=torch.float64, rows=16, wide=(8, 10)):
    g = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype) for d in wide)
    return x, torch.tanh(y)


def made(dtype=torch.float64, settings=None, **options):
    chosen = {"blocks": {"^0$": (4, 3), "^2$": (6, 5)}, **(settings or {})}
    model = poet.convert(net(dtype), **chosen)
    optimizer = spectral_dist.POET(
        spectral_dist.param_groups(model), **{**reference.OPTIONS, **options}
    )
    return model, optimizer


def train(model, optimizer, steps, start=0, schedule=lambda step: 1.0, dtype=torch.float64):
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(start, start + steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(step)
        optimizer.zero_grad()
        Loss(model)(*batch(step, dtype)).backward()
        optimizer.step()


def index_of(model):
    """The permutations, as data."""
    layers = {key: model.get_submodule(key) for key in BLOCKS}
    sides = {(k, r.key.rpartition("/")[2]): r for k, m in layers.items() for r in m.rotations}
    return lambda key, side, merges: sides[key, side].index(merges)


def reference_run(model, order=4, blocks=BLOCKS, **options):
    """Return what the reference gives of the model before it was converted."""
    index = index_of(model)
    find = lambda key, side, merges: index(key.removeprefix("model."), side, merges)  # noqa: E731
    named = {f"model.{key}": pair for key, pair in blocks.items()}
    return reference.PoetTraining(Loss(net()), named, find, order, **options)


def agrees(model, run, tolerance=1e-11):
    for (key, side), skew in run.skews.items():
        mine = getattr(model.get_submodule(key.removeprefix("model.")), f"skew_{side}")
        torch.testing.assert_close(mine.detach().view_as(skew), skew, rtol=0, atol=tolerance)
    for key, w in run.frozen.items():
        layer = model.get_submodule(key.removeprefix("model."))
        torch.testing.assert_close(layer.weight.detach(), w, rtol=0, atol=tolerance)
        assert layer.merges == run.merges
    for key, p in run.scalars.items():
        mine = model.get_parameter(key.removeprefix("model."))
        torch.testing.assert_close(mine.detach(), p, rtol=0, atol=tolerance)


def skew_states(optimizer):
    for group in optimizer.param_groups:
        if group["kind"] == "skew":
            for p in group["params"]:
                yield p, optimizer.state[p]
