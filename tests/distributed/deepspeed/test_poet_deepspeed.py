"""SpectralPOET in a DeepSpeed JSON: one process's numbers at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.poet_runs import (
    BF16,
    CLIP,
    FP32_SUMS,
    STEPS,
    alone,
    apart,
    built,
    check,
    configured,
    everything,
    layers,
    refused,
    start,
    train,
)
from tests.support import harness

EVERYWHERE = [
    pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3,
]  # fmt: skip


@pytest.mark.parametrize("stage", EVERYWHERE)
def test_sharded_equals_one_process(stage: int) -> None:
    """Accumulation of 2, clipping with its ramp, two merges; and what is exported."""
    ranks = harness.run(2, train, configured(stage, 2, accumulation=2), export=True)
    check(ranks)
    wanted = alone(2)["losses"]
    means = [sum(r["losses"][i] for r in ranks) / 2 for i in range(2 * STEPS)]
    steps = [(sum(x[i : i + 2]) / 2 for i in range(0, 2 * STEPS, 2)) for x in (means, wanted)]
    for found, loss in zip(*steps, strict=True):
        assert found == pytest.approx(loss, rel=1e-6)
    for result in ranks:
        assert apart(result["exported"], alone()["exported"]) < 1e-6
        # no master, no gradient and no moment of W: this is all that the optimizer ever sees
        assert result["flat"] <= alone()["trained"] // (2 if stage else 1) + 64
    assert apart(alone(2)["parameters"], alone(1, CLIP * 4)["parameters"]) > 1e-3  # it acts


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("way", ["listed", "groups", "code", "client"])
def test_ways_to_convert(stage: int, way: str) -> None:
    """The JSON converts, or the user has; DeepSpeed is given what there was before, or nothing."""
    check(harness.run(2, train, configured(stage, 2, way), way))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage", "changes"),
    [
        (1, 2, {}), (4, 1, {}), (3, 2, {}), (3, 3, {}), (4, 3, {}),
        (2, 2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
        (2, 3, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
        (2, 2, {"zero": {"round_robin_gradients": True, "overlap_comm": True}}),
        (2, 3, {"zero": {"stage3_param_persistence_threshold": 0}}),
        (2, 3, {"zero": {"offload_param": {"device": "cpu"}}}),
    ],
)  # fmt: skip
def test_other_worlds_and_settings(world: int, stage: int, changes: dict[str, Any]) -> None:
    check(harness.run(world, train, configured(stage, world, **changes)))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["json", "code"])
def test_zero_init(way: str) -> None:
    """Its parameters are partitioned already when the model is converted, and W started anew."""
    check(harness.run(2, train, configured(3, 2, way), way, zero_init=True))


def after_a_merge(configuration: dict[str, Any], zero_init: bool = False) -> dict[str, Any]:
    """Train to a merge, and one step more at a learning rate of 0."""
    running = start(configuration, zero_init=zero_init)
    engine.steps(running, 0, 3)
    merged = everything(running)
    for group in running.basic_optimizer.param_groups:
        group["lr"] = 0.0
    engine.steps(running, 3, 4)
    result = {"merged": merged, "later": everything(running)}
    result["dtypes"] = {p.dtype for p in running.module.parameters()}
    running.destroy()
    return result


@pytest.mark.parametrize(
    ("stage", "changes", "wrapper"),
    [
        pytest.param(0, BF16, "FP16_UnfusedOptimizer", marks=pytest.mark.slow),
        pytest.param(1, BF16, "DeepSpeedZeroOptimizer", marks=pytest.mark.slow),
        pytest.param(1, FP32_SUMS, "BF16_Optimizer", marks=pytest.mark.slow),
        (2, BF16, "DeepSpeedZeroOptimizer"),
        pytest.param(3, BF16, "DeepSpeedZeroOptimizer_Stage3", marks=pytest.mark.slow),
        pytest.param(3, {**BF16, "init": True}, "DeepSpeedZeroOptimizer_Stage3",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_masters_are_merged_as_well(stage: int, changes: dict[str, Any], wrapper: str) -> None:
    """A step of lr 0 after a merge leaves every skew, the model's and its master, exactly 0."""
    changes = dict(changes)
    init = changes.pop("init", False)
    for result in harness.run(2, after_a_merge, configured(stage, 2, **changes), zero_init=init):
        assert result["dtypes"] == {torch.bfloat16}
        for when in ("merged", "later"):
            seen = result[when]
            assert seen["wrapper"] == wrapper
            assert seen["merges"] == [1] * 8
            assert all(not p.any() for p in seen["masters"]["skew"])
            assert len(seen["masters"]["skew"]) > 0
            skews = {n: p for n, p in seen["parameters"].items() if ".skew_" in n}
            assert len(skews) == 16
            assert all(not p.any() for p in skews.values())
        number = len(result["merged"]["masters"]["skew"])
        for state in result["merged"]["states"][:number]:
            assert all(not value.any() for value in state.values())
        for name, value in result["merged"]["parameters"].items():
            assert torch.equal(value, result["later"]["parameters"][name])


def overflowing(configuration: dict[str, Any]) -> dict[str, Any]:
    running = start(configuration)
    before = everything(running)
    engine.steps(running, 0, 1)
    skipped = running.skipped_steps
    middle = everything(running)
    for step in range(1, 40):
        engine.steps(running, step, step + 1)
        if running.skipped_steps == skipped:
            break
        skipped = running.skipped_steps
    result = {"before": before, "middle": middle, "after": everything(running), "skipped": skipped}
    running.destroy()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_step_is_none(stage: int) -> None:
    """fp16's overflow neither merges nor counts."""
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    options = {"merge_every": 1, "clip_ramp": 1}
    configuration = configured(stage, 2, fp16=fp16, options=options)
    for result in harness.run(2, overflowing, configuration):
        assert result["skipped"] >= 1
        before, middle = result["before"], result["middle"]
        assert middle["merges"] == [0] * 8
        assert all(torch.equal(v, middle["parameters"][n]) for n, v in before["parameters"].items())
        assert all(not value.any() for state in middle["states"] for value in state.values())
        assert result["after"]["merges"] == [1] * 8


def converted_again() -> list[int]:
    """The same model again with other settings, after an error when it had been converted."""
    model, right = built(), configured(2, 1)
    with pytest.raises(ValueError, match="leaves out"):
        engine.engine_for(right, model=model, parameters=list(model.layers[0].parameters()))
    other = configured(2, 1)
    other["optimizer"]["params"]["seed"] = 4
    with pytest.raises(ValueError, match="with other settings"):
        engine.engine_for(other, model=model)
    return [layer.merges for layer in layers(model)]


def test_errors() -> None:
    """Each names the setting and what to write instead."""
    refused(configured(2, 1), "would have no effect; take them out of the JSON", "code")
    misspelt = configured(2, 1)
    misspelt["optimizer"]["params"]["segmnts"] = 2
    refused(misspelt, "unknown option 'segmnts'; did you mean 'segments'")
    refused(configured(2, 1, options={"split": {"qkv": 3}}), "unknown option 'split'")
    refused(configured(2, 1, options={"order": 7}), "poet.convert: order is 7")
    refused(configured(2, 1, gradient_clipping=0.0), "clip_ramp is 2, but gradient_clipping is 0")
    refused(configured(3, 1, zero={"zero_quantized_weights": True}), "round it again")
    assert harness.run(1, converted_again) == [[0] * 8]
    with pytest.raises(ValueError, match=r"spectral_dist.POET\(spectral_dist.param_groups"):
        in_code()


def in_code() -> None:
    from spectral_dist.integrations.deepspeed import SpectralPOET

    SpectralPOET([])
