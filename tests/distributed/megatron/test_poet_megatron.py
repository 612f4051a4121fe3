"""spectral_poet under Megatron: one process's numbers, and its merges under every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.distributed.megatron.poet_megatron_runs import EVERY, GATHERING, STEPS, train
from tests.support import harness

NEW, OLD = "0.19.2", "0.16.1"


@functools.cache
def alone() -> dict[str, Any]:
    return harness.run(1, train, NEW, monitored=True, pool=NEW)[0]


def compare(one: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    assert one["losses"] == pytest.approx(wanted["losses"], rel=0, abs=bound)
    assert one["norms"] == pytest.approx(wanted["norms"], rel=0, abs=bound)
    for what in ("parameters", "gradients"):
        for key, value in one[what].items():
            error = float((value - wanted[what][key]).abs().max())
            assert error < bound, (what, key, error)
    assert (one["merges"], one["since"]) == ({STEPS // EVERY}, STEPS % EVERY)


def check_reports(one: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert [step for step, _ in one["reports"]] == [3, 6]
    for (_, here), (_, there) in zip(one["reports"], wanted["reports"], strict=True):
        assert here.keys() == there.keys() > {"skew_norm", "singular_value_drift"}
        for key, value in here["skew_norm"].items():
            assert value == pytest.approx(there["skew_norm"][key], rel=1e-4)
            assert value > 0.01
            assert here["singular_value_drift"][key] < 1e-5
            assert there["singular_value_drift"][key] < 1e-5


def test_tensor_parallel_ranks_give_the_numbers_of_one() -> None:
    """In float32: losses, gradients and parameters to 2e-6, spectra of whole matrices to 1e-5."""
    wanted = alone()
    args = (NEW, {"tp": 2}, {}, {"sequence_parallel": True})
    found = harness.run(2, train, *args, monitored=True, pool=NEW)
    for one in found:
        compare(one, wanted, 2e-6)
        # what ranks agree on before a step, and two numbers of each layer at a merge
        assert one["bytes"] == 12 * STEPS + 2 * 8 * len(one["spectra"])
        assert one["drift"] < 1e-5
        for key, values in one["spectra"].items():
            assert torch.allclose(values, wanted["spectra"][key], atol=2e-6), key
    check_reports(found[0], wanted)


def test_a_rotation_of_each_rank_would_be_wrong() -> None:
    """The negative control: the spectra of tiles stay, those of whole matrices do not."""
    for one in harness.run(2, train, NEW, {"tp": 2}, independent=True, pool=NEW):
        assert one["tile drift"] < 1e-5
        assert one["drift"] > 1e-3


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP 2": (2, {"tp": 2}, {}, {}),
    "TP 4": (4, {"tp": 4}, {}, {}),
    "TP 4, sequence parallel": (4, {"tp": 4}, {}, {"sequence_parallel": True}),
    "DP 2": (2, {}, {}, {}),
    "TP 2 x DP 2": (4, {"tp": 2}, {}, {}),
    "TP 2 x DP 2, distributed optimizer": (4, {"tp": 2}, DISTRIBUTED, {}),
    "TP 2 x DP 2, overlapped": (4, {"tp": 2}, GATHERING, {"sequence_parallel": True}),
    "DP 4, distributed optimizer": (4, {}, DISTRIBUTED, {}),
    "TP 2 x PP 2": (4, {"tp": 2, "pp": 2}, {}, {}),
    "TP 2 x PP 2, distributed optimizer": (4, {"tp": 2, "pp": 2}, DISTRIBUTED, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, version: str) -> None:
    ranks, *args = LAYOUTS[layout]
    for one in harness.run(ranks, train, version, *args, monitored=True, pool=version):
        compare(one, alone(), 5e-6)
        assert one["drift"] < 1e-5


DOUBLE = {"params_dtype": torch.float64, "pipeline_dtype": torch.float64}
UNCLIPPED = {"config": {"clip_grad": 0.0}}  # Megatron clips float32 only


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "groups", "model"),
    [(2, {"tp": 2}, {"sequence_parallel": True}), (4, {"tp": 2}, {}), (4, {"tp": 4}, {})],
)
def test_double_precision_leaves_what_the_losses_float32_does(ranks, groups, model) -> None:
    """Megatron takes losses and norms' gradients in float32 even here."""
    wanted = harness.run(1, train, NEW, {}, {}, DOUBLE, pool=NEW, **UNCLIPPED)[0]
    args = (NEW, groups, {}, {**DOUBLE, **model})
    for one in harness.run(ranks, train, *args, pool=NEW, **UNCLIPPED):
        compare(one, wanted, 5e-7)
        assert one["drift"] < 1e-9  # the map's own, of order 4
        for key, value in one["gradients"].items():
            if "skew" in key:
                assert float((value - wanted["gradients"][key]).abs().max()) < 1e-8, key


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "biases": ({"add_bias_linear": True, "add_qkv_bias": True}, {}),
    "memory": ({}, {"variant": "memory"}),
    "grouped queries": ({"query_groups": 2}, {"blocks": {r"linear_qkv\.[kv]$": 4}}),
    "a gate of attention": ({"query_groups": 2, "attention_output_gate": True}, {}),
    "no gate": ({"swiglu": False, "tied": True}, {"order": 3}),
    "drawn": ({}, {"init": "normalized", "seed": 5}),
    "drawn, uniform": ({}, {"init": "uniform_spectrum"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_and_settings(name: str, sequence_parallel: bool) -> None:
    model, settings = OTHERS[name]
    wanted = harness.run(1, train, NEW, {}, {}, model, settings, pool=NEW)[0]
    args = ({**model, "sequence_parallel": sequence_parallel}, settings)
    for one in harness.run(2, train, NEW, {"tp": 2}, DISTRIBUTED, *args, pool=NEW):
        compare(one, wanted, 1e-5)
    assert (name == "memory") <= (wanted["losses"] == alone()["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_experts_are_rotated_each_by_itself(version: str) -> None:
    wanted = harness.run(1, train, NEW, {}, {}, {"moe_experts": 4}, pool=NEW)[0]
    found = harness.run(2, train, version, {"ep": 2}, {}, {"moe_experts": 4}, pool=version)
    for one in found:
        compare(one, wanted, 1e-5)
    assert any("experts.3." in key and "skew_out_up" in key for key in wanted["parameters"])
