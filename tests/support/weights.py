"""Small models of named weights for the tests of Muon, and what a step must do to them."""

from __future__ import annotations

import copy

import torch
from torch import nn

import spectral_dist
from tests.reference import polar as reference

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}


class Weights(nn.Module):
    """Bias-free Linear weights by name, random."""

    def __init__(self, seed=0, dtype=torch.float32, **shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (m, n) in shapes.items():
            layer = nn.Linear(n, m, bias=False, dtype=dtype)
            layer.weight.data = (0.3 * torch.randn(m, n, generator=generator)).to(dtype)
            setattr(self, name, layer)


class Single(nn.Module):
    """One matrix that is given."""

    def __init__(self, weight):
        super().__init__()
        self.only = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        self.only.weight = nn.Parameter(weight.clone())


def muon(model, lr=0.02, matrices=(), scalars=(), split=None, **options):
    found = spectral_dist.param_groups(model, matrices=matrices, scalars=scalars, split=split)
    return spectral_dist.Muon(found, lr=lr, **options)


def give_gradients(model, step, skip=()):
    generator = torch.Generator().manual_seed(500 + step)
    for name, p in model.named_parameters():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if name in skip or not p.requires_grad else g


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def expect(model, count, factor, *, lr, polar, beta=0.95, nesterov=True, decay=0.1):
    """Weights after ``count`` steps of specs/muon.md on give_gradients, in float64."""
    model = copy.deepcopy(model)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    momenta = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(count):
        give_gradients(model, step)
        for name, p in model.named_parameters():
            g = p.grad.double()
            momenta[name] = beta * momenta[name] + (1 - beta) * g
            u = polar((1 - beta) * g + beta * momenta[name] if nesterov else momenta[name])
            w = weights[name]
            weights[name] = (1 - lr * decay) * w - lr * factor(*w.shape) * u
    return weights


def jordan(x):
    return reference.newton_schulz("jordan", 5, x)


def moonlight(m, n):
    return 0.2 * max(m, n) ** 0.5


FACTORS = {
    "match_rms_adamw": moonlight,
    "original": lambda m, n: max(1, m / n) ** 0.5,
    "spectral": lambda m, n: (m / n) ** 0.5,
    "none": lambda m, n: 1,
}
SHAPES = {"wide": (4, 9), "tall": (10, 3), "square": (6, 6), "row": (1, 5), "column": (7, 1)}


def mixed_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).to(
        dtype
    )


def run(model, steps, names=None, **options):
    """Weights after ``steps`` with gradients that depend on the step only."""
    optimizer = muon(model, **options)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return optimizer
