"""DeepSpeed's PipelineModule: two stages on two data-parallel ranks each, as one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import pipeline_runs as runs
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
MATRICES = 3 * 4
"""Three blocks of four matrices each."""
# DeepSpeed keeps the stages' groups in a global, for later engines too
run = functools.partial(harness.run, 4, pool="pipeline")


@functools.cache
def alone(kind: str, tied: bool, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """Our own optimizer in one process of plain torch."""
    import spectral_dist

    model = runs.Alone(tied)
    cls = getattr(spectral_dist, kind.removeprefix("Spectral"))
    optimizer = cls(spectral_dist.param_groups(model), **SCALARS, **RULES[kind])
    for step in range(STEPS):
        optimizer.zero_grad()
        model(layouts.tokens(step)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def check(ranks: list[dict[str, Any]], wanted: dict[str, torch.Tensor]) -> None:
    names = set()
    for result in ranks:
        for name, value in result["parameters"].items():
            bound = 1e-6 if training.is_matrix(name) else 1e-5
            assert (value - wanted[name]).abs().max() < bound, name
            assert (result["kinds"][name] == "matrix") is training.is_matrix(name), name
            names.add(name)
    assert names == wanted.keys()


CASES = [
    (kind, stage, tied, clip)
    for kind in RULES
    for stage, tied, clip in [(0, False, 0.0), (1, False, 0.3), (0, True, 0.0), (1, True, 0.3)]
]


@pytest.mark.parametrize(("kind", "stage", "tied", "clip"), CASES)
@pytest.mark.fast_cases("SpectralMuon-1-True-0.3")
def test_stages_equal_one_process(kind: str, stage: int, tied: bool, clip: float) -> None:
    configuration = runs.config(stage, kind, {**SCALARS, **RULES[kind]}, gradient_clipping=clip)
    ranks = run(runs.train, configuration, tied)
    check(ranks, alone(kind, tied, clip))
    assert sum(result["polar_calls"] for result in ranks) == STEPS * MATRICES


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SpectralMuon", "SpectralSUMO"])
@pytest.mark.parametrize("stage", [0, 1])
def test_resumed_is_uninterrupted(kind: str, stage: int, tmp_path: Path) -> None:
    options = {**SCALARS, **RULES[kind]}
    train = functools.partial(run, runs.train)
    whole = train(runs.config(stage, kind, options), folder=str(tmp_path))
    train(runs.config(stage, kind, options), last=2, folder=str(tmp_path), save="two")
    rest = train(runs.config(stage, kind, options), first=2, folder=str(tmp_path), load="two")
    for result, wanted in zip(rest, whole, strict=True):
        assert result["losses"] == wanted["losses"][2:]
        for name, value in wanted["parameters"].items():
            assert torch.equal(result["parameters"][name], value), name


def test_a_bad_gradient_is_told_to_every_stage() -> None:
    """Only the last stage's is bad, and the first would wait for the next batch's gradients."""
    configuration = runs.config(0, "SpectralMuon", {**SCALARS, "lr": 0.02})
    for text in harness.run_expecting_errors(
        4, runs.poisoned, configuration, within=20, pool="pipeline"
    ):
        assert "the gradient of 3.down.weight is NaN or infinite" in text


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "clipping at stage 0": ({"gradient_clipping": 1.0}, "", "where DeepSpeed takes the first"),
    "POET": ({"optimizer": {"type": "SpectralPOET", "params": {"lr": 0.01}}}, "", "PipelineModule"),
    "adapting": (
        {"optimizer": {"type": "SpectralROOT", "params": {"lr": 0.02, "adapt_every": 2}}},
        "", "adapt_every=0",
    ),
    "tied matrix": ({}, "tied matrix", '"scalars": \\["tied_modules.block"\\]'),
    "pattern": ({"options": {"scalars": ["nothing_like_it"]}}, "", "matches no trainable"),
    "patterns at odds": (
        {"options": {"scalars": ["^4"], "matrices": ["^4.weight"]}}, "", "4.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.fast_cases("tied matrix", "patterns at odds")
def test_refused_on_every_stage(case: str) -> None:
    changes, model, words = REFUSED[case]
    configuration = runs.engines.config(0, 2, accumulation=runs.MICRO, **changes)
    harness.run_refused(4, words, runs.build, configuration, model, within=20, pool="pipeline")


@pytest.mark.slow
def test_a_pattern_may_match_on_one_stage_only() -> None:
    options = {**SCALARS, "lr": 0.02, "scalars": ["^3.qkv"], "split": {"1.qkv": 3}}
    ranks = run(runs.train, runs.config(1, "SpectralMuon", options), last=1)
    assert sum(result["polar_calls"] for result in ranks) == MATRICES - 1 + 2
