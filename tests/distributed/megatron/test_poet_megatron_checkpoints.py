"""spectral_poet under Megatron: checkpoints, half precision, the end of a run, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.megatron import poet_megatron_runs as runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.support import harness

NEW, OLD = "0.19.2", "0.16.1"
GATHERING = runs.GATHERING
TARGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2 x DP 2": (4, {"tp": 2}),
    "TP 4": (4, {"tp": 4}),
    "DP 2": (2, {}),
    "PP 2": (2, {"pp": 2}),
    "alone": (1, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED])
def test_any_layout_goes_on_from_the_middle_of_a_cycle(tmp_path, wrapping, version) -> None:
    """Saved at TP 2 x DP 2, one step after a merge; a merge follows. Bit for bit there."""
    wanted = harness.run(4, runs.save, str(tmp_path), version, {"tp": 2}, wrapping, pool=version)[0]
    assert (wanted["merges"], wanted["since"]) == ({2}, 2)
    for target, (ranks, groups) in TARGETS.items():
        args = (str(tmp_path), version, groups, wrapping)
        got = harness.run(ranks, runs.load, *args, pool=version)[-1]
        same = target == "TP 2 x DP 2"
        assert got["losses"] == pytest.approx(wanted["losses"], rel=0, abs=0 if same else 2e-6)
        assert (got["merges"], got["since"], got["steps"]) == ({2}, 2, {1.0}), target
        for key, value in got["parameters"].items():
            assert float((value - wanted["parameters"][key]).abs().max()) <= 2e-6 * (not same)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("wrapping", [{}, GATHERING])
def test_just_before_and_just_after_a_merge(tmp_path, wrapping, steps) -> None:
    """In half precision, whose masters are in the checkpoint; bit for bit."""
    kwargs = {"model": {"bf16": True}}
    args = (NEW, {"tp": 2}, wrapping)
    wanted = harness.run(2, runs.save, str(tmp_path), *args, steps=steps, pool=NEW, **kwargs)[0]
    got = harness.run(2, runs.load, str(tmp_path), *args, pool=NEW, **kwargs)[0]
    assert got["losses"] == wanted["losses"]
    assert got["steps"] == {float(steps % runs.EVERY)}
    assert all(torch.equal(got["parameters"][k], v) for k, v in wanted["parameters"].items())


@pytest.mark.slow
def test_settings_of_the_checkpoint_are_checked(tmp_path) -> None:
    """Layers with other blocks than others of their kind are saved each by itself."""
    given = {"blocks": {r"layers\.0\.mlp": 4}, "scalars": [r"layers\.1\.mlp\.linear_fc2"]}
    args = (str(tmp_path), NEW, {"tp": 2})
    wanted = harness.run(2, runs.save, *args, settings=given, pool=NEW)[0]
    got = harness.run(1, runs.load, str(tmp_path), NEW, settings=given, pool=NEW)[0]
    assert got["losses"] == pytest.approx(wanted["losses"], rel=0, abs=2e-6)
    staged = dict(given, scalars=[r"layers\.0\.mlp\.linear_fc2"])  # on each stage they count from 0
    for stage in harness.run(2, runs.attempt, "build", NEW, {"pp": 2}, settings=staged, pool=NEW):
        assert not stage
    for other in ({"seed": 1}, {"order": 3}):
        args = ("load", str(tmp_path), NEW)
        text = harness.run(1, runs.attempt, *args, settings={**given, **other}, pool=NEW)[0]
        assert f"{next(iter(other))} is" in text
        assert "in the checkpoint" in text


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED])
def test_experts_in_checkpoints(tmp_path, wrapping, version) -> None:
    kwargs = {"model": {"moe_experts": 4}, "pool": version}
    args = (str(tmp_path), version)
    wanted = harness.run(2, runs.save, *args, {"ep": 2}, wrapping, **kwargs)[0]
    found = harness.run(4, runs.load, *args, {"ep": 4}, wrapping, **kwargs)
    assert set().union(*(got["steps"] for got in found)) == {1.0}
    assert found[0]["losses"] == pytest.approx(wanted["losses"], rel=0, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "wrapping", "half"),
    [(2, {}, True), (4, DISTRIBUTED, True), (4, GATHERING, True), (4, DISTRIBUTED, False)],
)
def test_a_step_without_lr_leaves_rotations_where_a_merge_put_them(ranks, wrapping, half, version):
    """Masters restart with the model, or they would bring the old rotations back."""
    args = (version, {"tp": 2}, wrapping, {"bf16": half})
    everyone = harness.run(ranks, runs.after_a_merge, *args, pool=version)
    for found in everyone:
        assert found["before"]["model"] > 0.01
        for when in ("after", "last"):
            assert found[when] == {"model": 0.0, "master": 0.0}, when
        assert found["moments"] == 0.0
        assert found["states"] <= {"torch.float32"}
        assert found["dtypes"][0] == {"torch.bfloat16" if half else "torch.float32"}
        assert found["dtypes"][1] <= {"torch.float32"}
    assert max(found["before"]["master"] for found in everyone) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "wrapping", "model"),
    [
        (NEW, {}, {}),
        (NEW, GATHERING, {"sequence_parallel": True}),
        (NEW, {}, {"add_bias_linear": True, "add_qkv_bias": True}),
        (OLD, {}, {}),
        (NEW, {}, {"bf16": True}),
    ],
)
def test_exported_tiles_are_those_of_a_plain_model(version, wrapping, model) -> None:
    """And W has neither a gradient nor a place for one."""
    args = (version, {"tp": 2}, wrapping)
    for found in harness.run(2, runs.exported, *args, model=model, pool=version):
        half = "bf16" in model
        assert found["error"] < (0.05 if half else 5e-6)
        assert found["names"]
        assert found["dtypes"] == {"torch.bfloat16" if half else "torch.float32"}
        assert not any(found["buffers"])


ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "muon": (("muon_on_rotations", NEW), {}, ["spectral_poet", "converted"]),
    "plain": (
        ("poet_on_weights", NEW),
        {},
        ["poet.convert(model)", "model_provider", "this one has none"],
    ),
    "wrapped": (("convert_wrapped", NEW), {}, ["DistributedDataParallel", "model_provider"]),
    "again": (("convert_again", NEW), {}, ["converted already"]),
    "unknown": (("build", NEW), {"settings": {"blok": 8}}, ["did you mean 'block'"]),
    "indivisible": (
        ("build", NEW),
        {"settings": {"block": 16, "segments": 4}},
        [f"layers.0.mlp.linear_fc1/out_{part}" for part in ("gate", "up")],
    ),
    "two sizes for a part": (
        ("build", NEW),
        {"settings": {"blocks": {r"qkv\.k": (8, 4)}}},
        ["linear_qkv.k is a part of the outputs"],
    ),
    "no such layer": (
        ("build", NEW),
        {"settings": {"blocks": {"gate_proj": 8}}},
        ["matches no trainable parameter"],
    ),
    "the head": (
        ("build", NEW),
        {"settings": {"matrices": ["output_layer"]}},
        ["output_layer", "only hidden layers"],
    ),
    "nothing to clip": (
        ("build", NEW),
        {"options": {"clip_ramp": 2}, "config": {"clip_grad": 0.0}},
        ["clip_ramp is 2"],
    ),
    "routers are told": (
        ("build", NEW),
        {"model": {"moe_experts": 4}},
        ["leaves to AdamW", "router.weight (TopKRouter)"],
    ),
}


def test_errors_name_the_setting_and_what_to_write() -> None:
    for case, (args, kwargs, texts) in ERRORS.items():
        found = harness.run(1, runs.attempt, *args, pool=NEW, **kwargs)[0]
        for text in texts:
            assert text in found, (case, found)


@pytest.mark.slow
def test_segments_must_suit_the_ranks() -> None:
    args = ("build", NEW, {"tp": 2})
    kwargs = {"settings": {"segments": 3, "block": 2}, "pool": NEW}
    for found in harness.run(2, runs.attempt, *args, **kwargs):
        assert "which is no multiple of the 2 ranks" in found
        assert "layers.0.mlp.linear_fc2/in" in found


def test_neither_the_scheduler_nor_skipped_steps_reach_the_rotations() -> None:
    """Rotations do not decay; the clipping limit rises after a merge, by steps that were taken."""
    groups = harness.run(1, runs.scheduled, NEW, pool=NEW)[0]
    assert groups == [("scalar", 0.005, 0.0), ("scalar", 0.005, 0.1), ("skew", 0.005, 0.0)]
    found = harness.run(1, runs.limits, NEW, 2, pool=NEW)[0]
    # steps 0, 2, 3 and the merge; 4 is skipped, 5, 6; step 1 was skipped as well
    assert found["limits"] == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.275])
    assert (found["after"], found["since"]) == (0.5, 2)
