"""Legs of a run: load a checkpoint in a layout of plain torch, take steps, save another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import spectral_dist
from spectral_dist import checkpoint
from tests.distributed.torch import layouts
from tests.support.quiet import quiet

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("Muon", OPTIONS),
    "polar first": ("PolarGrad", {**OPTIONS, "lr": 0.1, "polar_first": True}),
    "root": ("ROOT", OPTIONS),
}
# of the first block's qkv each matrix lies in three places; of the second's, in one
SPLIT = {r"layers\.0\.qkv": [12, 6, 6], r"layers\.1\.qkv": 3}


def start(layout: str, rule: str = "muon", **changes: Any) -> tuple[layouts.Laid, Any]:
    """The model laid out, other weights if not trained from here, and its optimizer."""
    model = layouts.LAYOUTS[layout][0](layouts.conditioned(seed=changes.pop("seed", 0)))
    name, options = RULES[rule]
    with quiet():
        groups = spectral_dist.param_groups(model.model, split=changes.pop("split", SPLIT))
        return model, getattr(spectral_dist, name)(groups, **{**options, **changes})


def take_steps(placed: layouts.Laid, optimizer: Any, first: int, last: int) -> list[float]:
    losses = []
    with quiet():
        for step in range(first, last):
            losses += placed.backward(step)
            optimizer.step()
    return losses


def states(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """What this rank keeps, by parameter and key."""
    routes = {id(route.parameter): route.name for route in optimizer.all_routes}
    found: dict[str, dict[str, Tensor]] = {}
    for p, state in optimizer.state.items():
        local = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in state.items()}
        found[routes[id(p)]] = {k: v.detach().clone() for k, v in local.items()}
    return found


def same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    """Every bit and dtype of ``states``."""
    assert found.keys() == wanted.keys()
    for name, state in wanted.items():
        assert found[name].keys() == state.keys()
        for key, value in state.items():
            assert found[name][key].dtype == value.dtype
            assert torch.equal(found[name][key], value), (name, key)


def leg(
    layout: str, rule: str, first: int, last: int, load: str = "", save: str = "", **changes: Any
) -> dict[str, Any]:
    """Load folder ``load`` if given, take steps [first, last), save into ``save`` if given."""
    placed, optimizer = start(layout, rule, **({"seed": 1} if load else {}), **changes)
    if load:
        with quiet():  # torch warns of one process
            checkpoint.load(load, placed.model, optimizer)
    loaded = states(optimizer)
    losses = take_steps(placed, optimizer, first, last)
    if save:
        with quiet():
            checkpoint.save(save, placed.model, optimizer)
    return {
        "losses": losses,
        "parameters": placed.full(),
        "loaded": loaded,
        "states": states(optimizer),
    }
