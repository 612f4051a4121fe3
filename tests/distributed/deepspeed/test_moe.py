"""Layers of deepspeed.moe: experts on two of four ranks, and two copies of each, as one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import moe_runs as runs
from tests.distributed.torch import layouts
from tests.reference import training
from tests.support import harness

STEPS = 4
SCALARS = {"weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
RULES: dict[str, dict[str, Any]] = {
    "SpectralMuon": {"lr": 0.02},
    "SpectralPolarGrad": {"lr": 0.1},
    "SpectralROOT": {"lr": 0.02},
    "SpectralSUMO": {"lr": 0.01, "rank": 0.5, "period": 2},
}
MATRICES = 2 * (4 + 1 + 2 * runs.EXPERTS)
"""In two layers: four of the block, the router, two of each expert."""


def is_matrix(name: str) -> bool:
    in_experts = "experts" in name or name.endswith("wg.weight")
    return name.endswith("weight") and (in_experts or training.is_matrix(name))


def config(stage: int, kind: str, **changes: Any) -> dict[str, Any]:
    result = runs.engines.config(stage, 4, **changes)
    result["optimizer"] = {"type": kind, "params": {**SCALARS, **RULES[kind]}}
    return result


@functools.cache
def alone(kind: str, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """Our own optimizer in one process of plain torch, with experts that no token goes to."""
    import spectral_dist

    model = runs.Model()
    cls = getattr(spectral_dist, kind.removeprefix("Spectral"))
    optimizer = cls(spectral_dist.param_groups(model), **SCALARS, **RULES[kind])
    idle = model.moe[0].deepspeed_moe.experts.deepspeed_experts[-1].up.weight
    for step in range(STEPS):
        optimizer.zero_grad()
        model(layouts.tokens(step)).backward()
        assert step or not idle.grad.any()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def check(ranks: list[dict[str, Any]], wanted: dict[str, torch.Tensor]) -> None:
    names = set()
    for result in ranks:
        for name, value in result["parameters"].items():
            bound = 1e-6 if is_matrix(name) else 1e-5
            assert (value - wanted[name]).abs().max() < bound, name
            assert (result["kinds"][name] == "matrix") is is_matrix(name), name
            assert result["matrices"][name] == [name] * is_matrix(name)
            names.add(name)
    assert names == wanted.keys()


CASES = [(kind, stage, clip) for kind in RULES for stage, clip in [(0, 0.0), (1, 0.3), (2, 0.3)]]


@pytest.mark.parametrize(("kind", "stage", "clip"), CASES)
@pytest.mark.fast_cases("SpectralMuon-2-0.3")
def test_experts_equal_one_process(kind: str, stage: int, clip: float) -> None:
    ranks = harness.run(4, runs.train, config(stage, kind, gradient_clipping=clip))
    check(ranks, alone(kind, clip))
    assert sum(result["polar_calls"] for result in ranks) == STEPS * MATRICES


@pytest.mark.slow
def test_each_expert_on_one_rank_only() -> None:
    ranks = harness.run(4, runs.train, config(1, "SpectralMuon"), ep_size=4)
    check(ranks, alone("SpectralMuon"))
    assert sum(result["polar_calls"] for result in ranks) == STEPS * MATRICES


REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "client optimizer": ({}, True, "name the optimizer in the JSON"),
    "POET": ({"optimizer": {"type": "SpectralPOET", "params": {"lr": 0.01}}}, False, "POET under"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.fast_cases("client optimizer")
def test_refused_on_every_rank(case: str) -> None:
    changes, client, words = REFUSED[case]
    configuration = runs.engines.config(1, 4, **changes)
    harness.run_refused(4, words, runs.build, configuration, client, within=20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SpectralMuon", "SpectralSUMO"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resumed_is_uninterrupted(kind: str, stage: int, tmp_path: Path) -> None:
    train = functools.partial(harness.run, 4, runs.train, folder=str(tmp_path))
    whole = train(config(stage, kind))
    train(config(stage, kind), last=2, save="two")
    rest = train(config(stage, kind), first=2, load="two")
    for result, wanted in zip(rest, whole, strict=True):
        assert result["losses"] == wanted["losses"][2:]
        for name, value in wanted["parameters"].items():
            assert torch.equal(result["parameters"][name], value), name
