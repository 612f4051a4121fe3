"""Megatron's distributed checkpoints: saved under one layout, training goes on under another."""

from __future__ import annotations

import pytest

from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.support import harness

NEW, OLD = "0.19.2", "0.16.1"
WRAPPINGS = {"": {}, "distributed optimizer": DISTRIBUTED}
TARGETS = {"TP 2 x DP 2": (4, {"tp": 2}), "DP 4": (4, {}), "TP 4": (4, {"tp": 4}), "alone": (1, {})}


def resume(folder, version, name, wrapping, targets, sharding=None, **kwargs):
    """Losses after a save at TP 2 x DP 2, and what each target goes on with."""
    args = (version, name, {"tp": 2}, wrapping)
    wanted = harness.run(
        4, runs.save, str(folder), *args, sharding=sharding, pool=version, **kwargs
    )[0]
    found = {}
    for target in targets:
        ranks, groups = TARGETS[target]
        args = (str(folder), version, name, groups, wrapping)
        found[target] = harness.run(
            ranks, runs.load, *args, sharding=sharding, pool=version, **kwargs
        )[0]
    return wanted, found


@pytest.mark.parametrize(
    ("version", "wrapping"),
    [
        *((NEW, wrapping) for wrapping in WRAPPINGS),
        pytest.param(OLD, "distributed optimizer", marks=pytest.mark.slow),
        pytest.param(OLD, "", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_losses_are_those_of_the_run_that_never_stopped(tmp_path, version, wrapping):
    targets = TARGETS if version == NEW else ["TP 2 x DP 2", "DP 4"]
    wanted, found = resume(tmp_path, version, "spectral_muon", WRAPPINGS[wrapping], targets)
    for target, got in found.items():
        exact = target == "TP 2 x DP 2"  # where nothing is computed otherwise than before
        assert got["losses"] == pytest.approx(wanted, rel=0, abs=0 if exact else 1e-6), target
        assert got["steps"] == 3
        assert got["keys"] == ["exp_avg", "exp_avg_sq", "step"]  # of matrices and of the rest


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.slow
def test_a_checkpoint_may_change_between_momentum_at_owners_and_on_shards(tmp_path, wrapping):
    """Back again: DP 4 to TP 2 x DP 2, with the other kind of optimizer state on the way."""
    args = (NEW, "spectral_polargrad", {}, WRAPPINGS[wrapping])
    wanted = harness.run(4, runs.save, str(tmp_path), *args, pool=NEW)[0]
    args = (str(tmp_path), NEW, "spectral_polargrad", {"tp": 2}, WRAPPINGS[wrapping])
    got = harness.run(4, runs.load, *args, pool=NEW)[0]
    assert got["losses"] == pytest.approx(wanted, rel=0, abs=1e-6)


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.fast_cases("fully_reshardable")
def test_formats_of_the_distributed_optimizer(tmp_path, sharding):
    wanted, found = resume(
        tmp_path, NEW, "spectral_muon", DISTRIBUTED, ["TP 2 x DP 2"], sharding=sharding
    )
    assert found["TP 2 x DP 2"]["losses"] == wanted


@pytest.mark.parametrize(
    "wrapping", ["", pytest.param("distributed optimizer", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_coefficients_that_root_has_adapted_are_saved(tmp_path, wrapping):
    """They change in step 2, between the groups' options, which flags set, and state."""
    options = {"adapt_every": 2}
    wanted, found = resume(
        tmp_path, NEW, "spectral_root", WRAPPINGS[wrapping], ["DP 4"], options=options
    )
    assert found["DP 4"]["losses"] == pytest.approx(wanted, rel=0, abs=1e-6)
    table = found["DP 4"]["coefficients"][0]
    assert list(table["64x64"]) != [3.4445, -4.7750, 2.0315]


@pytest.mark.slow
def test_bf16_resumes_from_its_float32_masters(tmp_path):
    for number, wrapping in enumerate((DISTRIBUTED, {})):
        folder = tmp_path / str(number)
        folder.mkdir()
        wanted, found = resume(
            folder, NEW, "spectral_muon", wrapping, ["TP 2 x DP 2"], model={"bf16": True}
        )
        assert found["TP 2 x DP 2"]["losses"] == wanted


def legacy(options):
    _, _, optimizer = runs.build(NEW, "spectral_muon", options=options)
    for inner in runs.inner(optimizer):
        inner.prepare()
    try:
        return sorted(optimizer.state_dict()["state"][0])
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_a_checkpoint_by_one_rank_says_that_momentum_is_elsewhere():
    found = harness.run(2, legacy, {}, pool=NEW)
    assert all("--ckpt-format torch_dist" in text for text in found)
    whole = harness.run(2, legacy, {"replicate_momentum": True}, pool=NEW)
    assert all("exp_avg" in keys for keys in whole)
