"""A run goes on from torch.optim.Muon or dion as ours, and from ours as theirs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_dist import checkpoint
from spectral_dist.checkpoint import convert
from tests.reference import training
from tests.support import models
from tests.support.quiet import quiet
from tests.unit.checkpoint.converting import (
    changed,
    kinds,
    loaded,
    refused,
    saved,
    steps,
    torch_file,
    torchs,
)

BFLOAT16 = {"polar_dtype": "bfloat16"}


# -- torch.optim.Muon


def test_torchs_muon_goes_on_as_ours(tmp_path: Path) -> None:
    model, optimizers = torch_file(tmp_path / "a.pt")
    convert.convert("torch", tmp_path / "a.pt", "dcp", tmp_path / "b")
    other, ours = loaded(tmp_path / "b", odd=False, **BFLOAT16)
    assert [g["lr"] * g["lr_ratio"] for g in ours.param_groups] == pytest.approx([0.02, 0.005])
    assert ours.param_groups[1]["betas"] == (0.9, 0.95)
    pairs = list(zip(model.named_parameters(), other.named_parameters(), strict=True))
    for (name, p), (_, q) in pairs:
        matrix = training.is_matrix(name)
        theirs = optimizers["muon" if matrix else "adamw"].state[p]
        momentum = theirs["momentum_buffer" if matrix else "exp_avg"]
        assert torch.equal(momentum, ours.state[q]["exp_avg"])
        assert ours.state[q]["step"] == 3
        assert torch.equal(p, q)
    losses = steps(model, optimizers.values(), 3, 6), steps(other, [ours], 3, 6)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # bfloat16, in another order
    for (name, p), (_, q) in pairs:
        assert float((p - q).detach().norm() / p.detach().norm()) < 5e-3, name


def test_ours_goes_on_as_torchs_muon(tmp_path: Path) -> None:
    model, ours = saved(tmp_path / "a", odd=False)
    convert.convert("dcp", tmp_path / "a", "torch", tmp_path / "b.pt")
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    other = models.build(seed=1, odd=False)
    other.load_state_dict(content["model"])
    theirs = torchs(other)
    expected = {k: o.state_dict()["param_groups"] for k, o in theirs.items()}
    for part, optimizer in theirs.items():
        assert content[part]["param_groups"] == expected[part]  # every option of its own, too
        optimizer.load_state_dict(content[part])
    ours.param_groups[0].update(BFLOAT16)
    losses = steps(model, [ours], 3, 6), steps(other, theirs.values(), 3, 6)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


# -- dion


class Dion(torch.optim.Optimizer):
    """The keys and the update of microsoft/dion's Muon (muon.py, scalar_opts.py), polar apart."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        common = {
            "lr": 0.01, "mu": 0.9, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "step": 0,
            "cautious_wd": False, "algorithm": "muon", "epsilon": 1e-8, "nesterov": True,
            "flatten": False, "adjust_lr": "spectral_norm",
        }  # fmt: skip
        super().__init__(groups, common)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            matrices = group["algorithm"] == "muon"
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state.update({} if matrices else {"variance": torch.zeros_like(p)})
                p.mul_(1 - group["lr"] * group["weight_decay"])
                (self.matrix if matrices else self.scalar)(p, p.grad, group, **state)

    def matrix(self, p: Tensor, g: Tensor, group: dict[str, Any], momentum: Tensor) -> None:
        momentum.mul_(group["mu"]).add_(g)
        u = training.jordan(momentum * group["mu"] + g if group["nesterov"] else momentum)
        p.sub_(u, alpha=group["lr"] * math.sqrt(p.shape[0] / p.shape[1]))

    def scalar(self, p: Tensor, g: Tensor, group: Any, momentum: Tensor, variance: Tensor) -> None:
        momentum.lerp_(g, 1 - group["beta1"])
        variance.lerp_(g * g, 1 - group["beta2"])
        corrections = [1 - group[beta] ** group["step"] for beta in ("beta1", "beta2")]
        below = (variance / corrections[1]).sqrt() + group["epsilon"]
        p.sub_(momentum / below, alpha=group["lr"] / corrections[0])


def dion(model: nn.Module) -> Dion:
    matrix, scalar = kinds(model)
    return Dion([{"params": matrix}, {"params": scalar, "algorithm": "adamw", "lr": 0.005}])


def test_dion_goes_on_as_ours_and_back(tmp_path: Path) -> None:
    model = models.build(odd=False)
    theirs = dion(model)
    steps(model, [theirs], 0, 3)
    torch.save({"model": model.state_dict(), "dion": theirs.state_dict()}, tmp_path / "a.pt")
    convert.convert("dion", tmp_path / "a.pt", "dcp", tmp_path / "b")
    other, ours = loaded(tmp_path / "b", odd=False)
    assert ours.param_groups[0]["scale"] == "spectral"
    weight, twin = model.layers[0].up.weight, other.layers[0].up.weight
    momentum = theirs.state[weight]["momentum"].double() * (1 - 0.9)
    assert torch.equal(ours.state[twin]["exp_avg"], momentum.float())
    lion = changed(
        tmp_path / "a.pt", lambda c: c["dion"]["param_groups"][1].update(algorithm="lion")
    )
    refused("embed.weight is trained by 'lion'", "dion", lion, "dcp", tmp_path / "e")
    losses = steps(model, [theirs], 3, 6), steps(other, [ours], 3, 6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with quiet():
        checkpoint.save(tmp_path / "c", other, ours)
    convert.convert("dcp", tmp_path / "c", "dion", tmp_path / "d.pt")
    content = torch.load(tmp_path / "d.pt", weights_only=True)
    back = models.build(seed=1, odd=False)
    back.load_state_dict(content["model"])
    resumed = dion(back)
    groups, written = (o["param_groups"] for o in (resumed.state_dict(), content["dion"]))
    assert [group.keys() for group in groups] == [group.keys() for group in written]
    resumed.load_state_dict(content["dion"])
    again = steps(model, [theirs], 6, 8), steps(back, [resumed], 6, 8)
    assert again[0] == pytest.approx(again[1], abs=1e-5)
