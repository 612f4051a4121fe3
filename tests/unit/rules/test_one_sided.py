"""Embeddings, heads and routers by the exact polar factor of their short side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spectral_dist
from tests.reference import rules
from tests.support import models


def groups(**options):
    return spectral_dist.param_groups(models.build(odd=False), **options)


def test_they_are_matrices_in_a_group_of_their_own():
    found = groups(one_sided=["embed", "head"])
    exact = [g for g in found if g.get("polar") == "eigh"]
    assert [[r.name for r in g["routes"]] for g in exact] == [["embed.weight", "head.weight"]]
    assert all(g["kind"] == "matrix" for g in exact)
    others = [r for g in found if g["kind"] == "matrix" and g not in exact for r in g["routes"]]
    assert len(others) == 8


def test_the_step_is_the_exact_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 5), nn.Linear(5, 5), nn.Linear(5, 3, bias=False))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = spectral_dist.param_groups(model, one_sided=[r"^0", r"^2"])
    optimizer = spectral_dist.PolarGrad(
        found, lr=0.1, weight_decay=0.0, momentum=0.5, polar="jordan"
    )
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            continue
        oracle = rules.svd if name[0] in "02" else rules.schedule("jordan")
        u = oracle(0.5 * p.grad.double())
        moved = 0.1 * (0.5 * p.grad.double() * u).sum() * u
        torch.testing.assert_close((start[name] - p).double(), moved, rtol=0, atol=1e-6)


def test_nu_power_of_a_group():
    model = nn.Sequential(nn.Embedding(13, 5), nn.Linear(5, 5, bias=False))
    found = spectral_dist.param_groups(model, one_sided=[r"^0"])
    [exact] = [g for g in found if g.get("polar") == "eigh"]
    exact["nu_power"] = 0.5
    optimizer = spectral_dist.PolarGrad(found, lr=0.1)
    powers = {g["polar"]: g["nu_power"] for g in optimizer.param_groups if g["kind"] == "matrix"}
    assert powers == {"eigh": 0.5, "qdwh": 1.0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"one_sided": ["nothing"]}, "one_sided: 'nothing' matches no trainable parameter"),
        ({"one_sided": ["norm"]}, "one_sided: 'norm' matches layers.0.norm.weight, which is 1-D"),
        ({"one_sided": ["head"], "scalars": ["head"]}, "head.weight matches both"),
        ({"one_sided": ["up.w"], "matrices": ["up.w"]}, "layers.0.up.weight matches both"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        groups(**options)


def test_root_has_no_polar_method_to_set():
    with pytest.raises(ValueError, match=r"no option 'polar'.*one_sided is for optimizers"):
        spectral_dist.ROOT(groups(one_sided=["embed"]))


def test_belongs_to_param_groups():
    with pytest.raises(ValueError, match="one_sided decides which parameters are matrices"):
        spectral_dist.Muon(groups(), one_sided=["embed"])
