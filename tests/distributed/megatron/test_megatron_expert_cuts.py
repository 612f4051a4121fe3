"""Experts cut by a tensor parallelism of their own, with expert parallelism and without."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.distributed.megatron.test_megatron_equality import (
    BOUND,
    NAMES,
    NEW,
    OLD,
    alone,
    check,
)
from tests.support import harness

EXPERTS = {"moe_experts": 4}
# the other dispatcher gathers parts of unequal sizes, which gloo cannot
DISPATCHER = {"moe_token_dispatcher_type": "allgather"}
GROUPED = {"moe_grouped_gemm": True}
SUMO = {"rank": 0.5, "period": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ETP 2 x EP 2": {"ep": 2, "etp": 2},
    "TP 2, ETP 2 x EP 2": {"tp": 2, "ep": 2, "etp": 2},
    "ETP 2": {"etp": 2},
    "TP 2, each expert whole": {"tp": 2, "etp": 1},
    "TP 2, ETP 4": {"tp": 2, "etp": 4},
}


def of_the_cut(groups: dict[str, Any]) -> dict[str, Any]:
    return {**DISPATCHER, "sequence_parallel": "tp" in groups}


@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("ETP 2 x EP 2-distributed optimizer")
def test_five_steps_are_those_of_one_process(layout: str, wrapping: dict[str, Any]) -> None:
    groups = LAYOUTS[layout]
    found = check(NEW, "spectral_muon", (4, groups, wrapping), EXPERTS, cut=of_the_cut(groups))
    wanted = alone(NEW, "spectral_muon", tuple(EXPERTS.items()))
    assert sum(one["polar_calls"] for one in found) == wanted["polar_calls"]


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("layout", ["ETP 2 x EP 2", "TP 2, ETP 2 x EP 2", "TP 2, ETP 4"])
def test_weights_of_grouped_layers(layout: str, wrapping: dict[str, Any]) -> None:
    """Grouped experts train as experts of a sequence do, whose weights have other attributes."""
    groups = LAYOUTS[layout]
    found = check(
        NEW, "spectral_muon", (4, groups, wrapping), EXPERTS, cut=of_the_cut(groups) | GROUPED
    )
    wanted = alone(NEW, "spectral_muon", tuple(EXPERTS.items()))
    assert sum(one["polar_calls"] for one in found) == wanted["polar_calls"]


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_five_steps_of_the_other_rules(name: str, wrapping: dict[str, Any]) -> None:
    groups = LAYOUTS["ETP 2 x EP 2"]
    check(NEW, name, (4, groups, wrapping), EXPERTS, cut=of_the_cut(groups))


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
def test_sumo(wrapping: dict[str, Any]) -> None:
    groups = LAYOUTS["ETP 2 x EP 2"]
    args = (NEW, "spectral_sumo")
    wanted = harness.run(1, runs.train, *args, {}, {}, EXPERTS, SUMO, pool=NEW)[0]
    model = EXPERTS | of_the_cut(groups)
    found = harness.run(4, runs.train, *args, groups, wrapping, model, SUMO, pool=NEW)
    for one in found:
        for key, value in wanted["parameters"].items():
            assert float((one["parameters"][key] - value).abs().max()) < BOUND, key
    for what in ("matrix_state", "polar_calls"):
        assert sum(one[what] for one in found) == wanted[what]


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize(("name", "options"), [("spectral_muon", {}), ("spectral_sumo", SUMO)])
def test_a_run_goes_on_with_experts_cut_otherwise(
    tmp_path: Any, name: str, options: dict[str, Any], wrapping: dict[str, Any]
) -> None:
    """Megatron's checkpoints with optimizers of experts do not load where there are none."""
    kwargs = {"options": options, "pool": NEW}
    groups = LAYOUTS["ETP 2 x EP 2"]
    args = (NEW, name, groups, wrapping, EXPERTS | DISPATCHER)
    wanted = harness.run(4, runs.save, str(tmp_path), *args, **kwargs)[0]
    for ranks, target in ((4, groups), (2, {"ep": 2})):
        args = (str(tmp_path), NEW, name, target, wrapping, EXPERTS | DISPATCHER)
        got = harness.run(ranks, runs.load, *args, **kwargs)[0]
        exact = target is groups
        assert got["losses"] == pytest.approx(wanted, rel=0, abs=0 if exact else 1e-6), target


@pytest.mark.slow
def test_the_older_megatron() -> None:
    """Without expert parallelism it sums gradients of such experts over the wrong ranks."""
    cut = of_the_cut(LAYOUTS["ETP 2 x EP 2"])
    check(OLD, "spectral_muon", (4, LAYOUTS["ETP 2 x EP 2"], DISTRIBUTED), EXPERTS, cut=cut)
    given = {"groups": {"tp": 2, "etp": 1}, "model": EXPERTS | {"sequence_parallel": True}}
    for text in harness.run(2, runs.error, OLD, "spectral_muon", pool=OLD, **given):
        assert "expert_tensor_parallel_size 1 beside tensor_model_parallel_size 2" in text


def convert_cut_experts() -> str:
    from tests.distributed.megatron import poet_megatron_runs

    model = EXPERTS | DISPATCHER
    return poet_megatron_runs.attempt("build", NEW, LAYOUTS["ETP 2 x EP 2"], {}, model)


def test_poet_refuses_experts_that_are_cut() -> None:
    for text in harness.run(4, convert_cut_experts, pool=NEW):
        assert "an expert that is cut over ranks" in text
        assert "write expert_tensor_parallel_size=1" in text
