"""Models of one linear layer that is rotated."""

from __future__ import annotations

import torch
from torch import nn

from spectral_dist import poet
from spectral_dist.poet.layer import PoetLinear
from tests.reference import poet as reference

M, N, ROWS = 12, 20, (2, 7)


class One(nn.Module):
    """A layer ``up``, n -> m, of float64 unless ``dtype`` says otherwise."""

    def __init__(self, m=M, n=N, bias=True, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(n, m, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.up(x)


def rotated(m=M, n=N, bias=True, dtype=torch.float64, turn=0.3, start=0, **settings):
    """A converted ``One``'s layer, its skews random."""
    chosen = {"blocks": {"up": (5, 3)}, **settings}
    layer = poet.convert(One(m, n, bias, dtype, start), **chosen).up
    spin(layer, turn, start)
    return layer


def spin(model, turn=0.3, seed=0):
    """Random skews, the largest ||Q|| of each being ``turn``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            for r in layer.rotations if isinstance(layer, PoetLinear) else ():
                v = torch.randn(r.shape, generator=generator, dtype=torch.float64)
                v = v * (turn / reference.thetas(v, r.block).max())
                getattr(layer, r.skew).copy_(v.flatten())


def weight_of(layer, leaves=None):
    """R_o W R_i by the reference, in float64."""
    skews = leaves or [getattr(layer, r.skew).detach().double() for r in layer.rotations]
    indices = [r.index(layer.merges).split(r.block) for r in layer.rotations]
    return reference.effective(layer.weight.double(), skews, indices, layer.settings.order)


def gradients(layer, x, upstream):
    """Return y, and the gradients of x and of every trained parameter, of a pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (torch.sin(y) * upstream).sum().backward()
    named = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return y.detach(), {"x": x.grad, **named}


def rows(*shape, seed=3, dtype=torch.float64):
    """Return random numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
