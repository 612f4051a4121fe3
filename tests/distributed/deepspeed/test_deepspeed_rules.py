"""PolarGrad and ROOT named in a DeepSpeed JSON: the numbers of one process at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.deepspeed import engine
from tests.distributed.torch import layouts
from tests.reference import rules, training
from tests.support import harness, models

STEPS = 10
SCALARS = {"weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "polargrad": ("SpectralPolarGrad", {"lr": 0.1}, "svd"),
    "polargrad, polar first": ("SpectralPolarGrad", {"lr": 0.1, "polar_first": True}, "svd"),
    "polargrad, polar first, jordan": (
        "SpectralPolarGrad", {"lr": 0.1, "polar_first": True, "polar": "jordan"}, "jordan",
    ),
    "root": ("SpectralROOT", {"lr": 0.02}, "jordan"),
}  # fmt: skip


def configured(stage: int, world: int, case: str, **changes: Any) -> dict[str, Any]:
    kind, options, _ = CASES[case]
    result = engine.config(stage, world, gradient_clipping=1.0, **changes)
    result["optimizer"] = {"type": kind, "params": {**SCALARS, **options}}
    return result


def train(configuration: dict[str, Any], count: int = STEPS, same: bool = False) -> dict[str, Any]:
    """``same``: everyone gets the whole batch, and gradients are equal bitwise."""
    model, tokens = layouts.conditioned(), layouts.tokens
    if same:  # a CPU's products round by alignment, and ZeRO-3 aligns weights in its own way
        model, tokens = models.build(), models.tokens
    running = engine.engine_for(configuration, model=model)
    world, rank = dist.get_world_size(), dist.get_rank()
    for step in range(count):
        batch = tokens(step)
        running.backward(running(batch if same else batch.chunk(world)[rank]))
        running.step()
    base = running.basic_optimizer
    result = {
        "parameters": engine.full_parameters(running),
        "polar_calls": base.polar_calls,
        "coefficients": base.param_groups[0].get("coefficients"),
    }
    running.destroy()
    return result


@pytest.fixture(scope="module")
def reference() -> Any:
    known: dict[str, dict[str, torch.Tensor]] = {}

    def get(case: str) -> dict[str, torch.Tensor]:
        if case not in known:
            kind, options, oracle = CASES[case]
            known[case] = training.train(
                {**SCALARS, **options}, STEPS, 1.0,
                rule=kind.removeprefix("Spectral").lower(),
                oracle=None if kind == "SpectralROOT" else rules.oracle(oracle),
                make=layouts.conditioned, tokens=layouts.tokens,
            )  # fmt: skip
        return known[case]

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 1), (3, 2), (2, 3), (4, 3)])
@pytest.mark.fast_cases(
    "2-0-polargrad",
    "2-1-root",
    "3-2-polargrad, polar first",
    "4-3-root",
    "2-3-polargrad, polar first, jordan",
    "4-3-polargrad",
)
def test_sharded_equals_one_process(world: int, stage: int, case: str, reference: Any) -> None:
    wanted = reference(case)
    ranks = harness.run(world, train, configured(stage, world, case))
    for result in ranks:
        for name, value in wanted.items():
            bound = 1e-6 if training.is_matrix(name) else 1e-5
            assert (result["parameters"][name] - value).abs().max() < bound, name
    matrices = 8 + 3 + 1
    assert sum(result["polar_calls"] for result in ranks) == STEPS * matrices


@pytest.mark.parametrize("case", CASES)
@pytest.mark.fast_cases("polargrad")
def test_bitwise_with_equal_gradients(case: str) -> None:
    """Also the number that polar-first PolarGrad sends beside each direction."""
    wanted: dict[str, torch.Tensor] = {}
    for world in (1, 2, 4):
        for stage in (0, 1, 3):
            configuration = configured(stage, world, case)
            configuration["optimizer"]["params"]["wire_dtype"] = "bfloat16"
            configuration.update(train_batch_size=12 * world, train_micro_batch_size_per_gpu=12)
            configuration["gradient_clipping"] = 0.0  # a sum over shards, in their order
            for result in harness.run(world, train, configuration, 3, True):
                wanted = wanted or result["parameters"]
                for name, value in wanted.items():
                    assert torch.equal(result["parameters"][name], value), (world, stage, name)


@pytest.mark.slow
def test_root_adapts_alike_at_every_stage() -> None:
    found = []
    for world, stage in ((1, 0), (2, 0), (2, 2), (2, 3)):
        configuration = configured(stage, world, "root")
        configuration["optimizer"]["params"]["adapt_every"] = 2
        configuration.update(train_batch_size=12 * world, train_micro_batch_size_per_gpu=12)
        configuration["gradient_clipping"] = 0.0
        found += harness.run(world, train, configuration, 5, True)
    for result in found:
        assert result["coefficients"] == found[0]["coefficients"]
        for name, value in found[0]["parameters"].items():
            assert torch.equal(result["parameters"][name], value)
    jordan = [3.4445, -4.775, 2.0315]
    assert any(row != jordan for row in found[0]["coefficients"].values())


def adapting_in_parts() -> str:
    configuration = configured(3, 2, "root", zero={"sub_group_size": 3000})
    configuration["optimizer"]["params"]["adapt_every"] = 2
    try:
        train(configuration, 2)
    except ValueError as error:
        return str(error)
    return "no error"


def test_adapting_needs_all_matrices_in_one_step() -> None:
    """ZeRO-3's sub-groups would see each other's new coefficients within one step."""
    for text in harness.run(2, adapting_in_parts):
        assert "set zero_optimization.sub_group_size above the number of parameters" in text
