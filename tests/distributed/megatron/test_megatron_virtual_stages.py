"""Several parts of the model on each pipeline rank, by Megatron's interleaved schedule."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron import poet_megatron_runs as poet_runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.distributed.megatron.test_megatron_equality import (
    BOUND,
    MATRICES,
    NAMES,
    NEW,
    OLD,
    OVERLAP,
    alone,
    check,
)
from tests.distributed.megatron.test_poet_megatron import compare
from tests.support import harness

PP = {"pp": 2, "virtual_pipeline_model_parallel_size": 2}
FOUR = {"layers": 4}
SUMO = {"rank": 0.5, "period": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "PP 2 x VPP 2": (2, PP, {}),
    "PP 2 x VPP 2, distributed optimizer": (2, PP, DISTRIBUTED),
    "DP 2 x PP 2 x VPP 2": (4, PP, {}),
    "DP 2 x PP 2 x VPP 2, distributed optimizer": (4, PP, DISTRIBUTED),
    "DP 2 x PP 2 x VPP 2, overlap": (4, PP, DISTRIBUTED | OVERLAP),
    "TP 2 x PP 2 x VPP 2, distributed optimizer": (4, {"tp": 2, **PP}, DISTRIBUTED),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("PP 2 x VPP 2, distributed optimizer")
def test_five_steps_are_those_of_one_process(layout: str) -> None:
    found = check(NEW, "spectral_muon", LAYOUTS[layout], FOUR)
    assert sum(one["polar_calls"] for one in found) == 5 * 2 * MATRICES


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_five_steps_of_the_other_rules(name: str, wrapping: dict[str, Any]) -> None:
    found = check(NEW, name, (2, PP, wrapping), FOUR)
    assert sum(one["polar_calls"] for one in found) == 5 * 2 * MATRICES


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
def test_sumo(wrapping: dict[str, Any]) -> None:
    """Its sketches go by names, so by layers' numbers in the whole model."""
    args = (NEW, "spectral_sumo")
    wanted = harness.run(1, runs.train, *args, {}, {}, FOUR, SUMO, pool=NEW)[0]
    found = harness.run(2, runs.train, *args, PP, wrapping, FOUR, SUMO, pool=NEW)
    for one in found:
        for key, value in wanted["parameters"].items():
            assert float((one["parameters"][key] - value).abs().max()) < BOUND, key
    for what in ("matrix_state", "polar_calls"):
        assert sum(one[what] for one in found) == wanted[what]


@pytest.mark.slow
def test_tied_embeddings_and_experts() -> None:
    check(NEW, "spectral_muon", (2, PP, DISTRIBUTED), {"layers": 4, "tied": True})
    check(NEW, "spectral_muon", (4, {"ep": 2, **PP}, {}), {"layers": 4, "moe_experts": 4})


@pytest.mark.slow
def test_gathers_during_the_step() -> None:
    """Megatron then has an optimizer for the first part, and one for the rest."""
    wanted = alone(NEW, "spectral_muon", tuple(FOUR.items()))
    args = (NEW, "spectral_muon", PP, DISTRIBUTED | OVERLAP, FOUR, {})
    config = {"overlap_param_gather_with_optimizer_step": True}
    for one in harness.run(4, runs.train, *args, config, pool=NEW):
        for key, value in wanted["parameters"].items():
            assert float((one["parameters"][key] - value).abs().max()) < BOUND, key


@pytest.mark.slow
def test_the_older_megatron() -> None:
    check(OLD, "spectral_muon", (2, PP, DISTRIBUTED), FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize(("name", "options"), [("spectral_muon", {}), ("spectral_sumo", SUMO)])
def test_a_run_goes_on_under_other_stages(
    tmp_path: Any, name: str, options: dict[str, Any], wrapping: dict[str, Any]
) -> None:
    kwargs = {"model": FOUR, "options": options, "pool": NEW}
    wanted = harness.run(2, runs.save, str(tmp_path), NEW, name, PP, wrapping, **kwargs)[0]
    for ranks, groups in ((2, PP), (1, {}), (2, {"pp": 2})):
        args = (str(tmp_path), NEW, name, groups, wrapping)
        got = harness.run(ranks, runs.load, *args, **kwargs)[0]
        exact = groups is PP
        assert got["losses"] == pytest.approx(wanted, rel=0, abs=0 if exact else 1e-6), groups
        assert got["steps"] == 3


# -- POET: all parts are converted together


@functools.cache
def poet_alone(settings: str) -> dict[str, Any]:
    args = (NEW, {}, {}, FOUR, BLOCKS[settings])
    return harness.run(1, poet_runs.train, *args, pool=NEW)[0]


BLOCKS: dict[str, dict[str, Any]] = {
    "alike": {},
    "a layer of the second part unlike the rest": {"blocks": {r"layers\.3\.mlp": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("settings", BLOCKS)
def test_poet(settings: str, wrapping: dict[str, Any], tmp_path: Any) -> None:
    args = (NEW, PP, wrapping, FOUR, BLOCKS[settings])
    for one in harness.run(2, poet_runs.train, *args, pool=NEW):
        compare(one, poet_alone(settings), 5e-6)
    wanted = harness.run(2, poet_runs.save, str(tmp_path), *args, pool=NEW)[0]
    got = harness.run(2, poet_runs.load, str(tmp_path), *args, pool=NEW)[0]
    assert got["losses"] == wanted["losses"]
