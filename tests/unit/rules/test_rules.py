"""Every rule of this package trains a language model as its reference does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spectral_dist
from spectral_dist.rules import registry
from tests.distributed.torch import layouts as torch_layouts
from tests.reference import normuon, rules, sumo, training
from tests.support.weights import OPTIONS, values

OF_SUMO = {"rank": 0.25, "period": 10**9, "basis": "svd", "perp_scale": 0.5}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Muon", {}), ("Muon", {"polar": "polar_express", "nesterov": False}),
    ("NorMuon", {}), ("NorMuon", {"polar": "svd", "beta2": 0.8}),
    ("PolarGrad", {"lr": 0.1}), ("PolarGrad", {"lr": 0.1, "polar_first": True}),
    ("PolarGrad", {"lr": 0.1, "polar": "jordan"}),
    ("ROOT", {}), ("ROOT", {"quantile": 0.7}),
    ("SUMO", OF_SUMO),
]  # fmt: skip
BOUNDS = {"NorMuon": 2e-6, "SUMO": 2e-6}
"""Of matrices, where others are within 1e-6: both scale small numbers up."""


def reference(title: str, options: dict[str, Any]) -> dict[str, Any]:
    """How ``training.train`` is to step."""
    if title == "SUMO":
        return {"take": sumo.SumoMatrices(lambda name, step: step == 0)}
    if title == "NorMuon":
        return {"take": normuon.NorMuonMatrices()}
    polar = options.get("polar", {"Muon": "jordan", "PolarGrad": "qdwh"}.get(title))
    return {"rule": title.lower(), "oracle": polar and rules.oracle(polar)}


@pytest.mark.parametrize(("title", "changes"), CASES)
def test_a_language_model_against_the_reference(title: str, changes: dict[str, Any]) -> None:
    """With stacks of experts, a split, a frozen weight and one that has no gradient."""
    options = {**OPTIONS, **changes}
    wanted = training.train(
        options, **reference(title, options), split={"qkv": 3}, skip_missing=True,
        make=torch_layouts.conditioned, tokens=torch_layouts.tokens,
    )  # fmt: skip
    model = torch_layouts.conditioned()
    start = values(model)
    groups = spectral_dist.param_groups(model, split={"qkv": 3})
    optimizer = getattr(spectral_dist, title)(groups, **options)
    for step in range(10):
        model.zero_grad()
        model(torch_layouts.tokens(step)).backward()
        if step == 0:
            with pytest.warns(UserWarning, match=r"unused\.weight has no gradient"):
                optimizer.step()
        else:
            optimizer.step()
    for name, w in values(model).items():
        # Adam amplifies rounding
        bound = BOUNDS.get(title, 1e-6) if training.is_matrix(name) else 1e-5
        torch.testing.assert_close(w, wanted[name], rtol=0, atol=bound, msg=name)
        still = name in ("frozen.weight", "unused.weight")
        assert torch.equal(w, start[name]) == still
        if training.is_matrix(name) and not still:  # else the comparison would show nothing
            assert 0.02 < (w - start[name]).norm() / start[name].norm() < 0.7


def test_no_rule_is_left_out() -> None:
    assert {entry.title for entry in registry.builtin_entries()} == {title for title, _ in CASES}
