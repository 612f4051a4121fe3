"""Steps of SUMO on matrices, and its state after them."""

from __future__ import annotations

import torch

import spectral_dist
from tests.reference import polar as formulas
from tests.support.weights import Single, same

LONG = 10**9
"""A period that no test reaches the end of: only the first step takes a basis."""


def sumo(model, lr=0.02, split=None, **options):
    return spectral_dist.SUMO(spectral_dist.param_groups(model, split=split), lr=lr, **options)


def graded(m, n, seed, low=0.3, rank=None):
    """Random float64, singular values from 1 to low at equal distances; of lower rank if given."""
    k = min(m, n) if rank is None else rank
    s = torch.linspace(1, low, k, dtype=torch.float64) if k > 1 else torch.ones(1).double()
    return formulas.with_singular_values(s, m, n, seed)


def follow(weight, gradients, optimizer=sumo, **options):
    """After each step the weight and, of SUMO, its state; always a matrix with its long side first.

    So a step of a wide matrix is seen as that of its transpose.
    """
    model = Single(weight)
    chosen = optimizer(model, **options)
    seen = []
    for g in gradients:
        model.only.weight.grad = g.clone().to(weight.dtype)
        chosen.step()
        w = model.only.weight.detach().clone()
        seen.append((w.mT if w.shape[0] < w.shape[1] else w, state_of(chosen).get("only.weight")))
    return seen


def after(weight, gradients, optimizer=sumo, **options):
    found = follow(weight, gradients, optimizer, **options)[-1][0]
    return found if found.shape == weight.shape else found.mT


def state_of(optimizer):
    """Copies of the matrix state."""
    if not isinstance(optimizer, getattr(spectral_dist, "SUMO", ())):
        return {}
    found = optimizer.matrix_state().items()
    return {name: {k: torch.as_tensor(v).clone() for k, v in s.items()} for name, s in found}


def refreshed(before, now):
    """Names of the matrices whose basis is another one."""
    return {
        name
        for name, state in now.items()
        if name not in before or not torch.equal(before[name]["basis"], state["basis"])
    }


def equal(one, other):
    """Whether states are the same, bitwise."""
    return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)


def update(g, **options):
    """(D, state) of a first step, with lr 1 and nothing else that moves a weight."""
    o = {"lr": 1.0, "weight_decay": 0.0, "period": LONG, "scale": "none", **options}
    w, state = follow(torch.zeros_like(g), [g], **o)[-1]
    return -w, state
