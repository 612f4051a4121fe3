"""Sequences cut over context-parallel ranks, whose gradients are summed as data-parallel ones.

Attention alone is the tests' own (``megatron_context``), since Megatron's needs a GPU.
"""

from __future__ import annotations

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
    check,
)
from tests.distributed.megatron.test_poet_megatron import alone as poet_alone
from tests.distributed.megatron.test_poet_megatron import compare
from tests.support import harness

CP = {"context_parallel_size": 2}
SUMO = {"rank": 0.5, "period": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "CP 2": (2, CP, {}),
    "CP 2, distributed optimizer": (2, CP, DISTRIBUTED),
    "CP 2 x DP 2": (4, CP, {}),
    "CP 2 x DP 2, distributed optimizer": (4, CP, DISTRIBUTED),
    "CP 2 x DP 2, overlap": (4, CP, DISTRIBUTED | OVERLAP),
    "TP 2 x CP 2": (4, {"tp": 2, **CP}, {}),
    "TP 2 x CP 2, distributed optimizer": (4, {"tp": 2, **CP}, DISTRIBUTED),
    "CP 2 x PP 2": (4, {"pp": 2, **CP}, {}),
}
TWO = ["CP 2 x DP 2", "CP 2 x DP 2, distributed optimizer"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("CP 2, distributed optimizer")
def test_five_steps_are_those_of_one_process(layout: str) -> None:
    found = check(NEW, "spectral_muon", LAYOUTS[layout])
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


@pytest.mark.slow
def test_experts() -> None:
    """Their data-parallel ranks have context-parallel ranks among them, too."""
    cut = {"moe_token_dispatcher_type": "allgather"}
    layout = (4, {"ep": 2, **CP}, DISTRIBUTED)
    check(NEW, "spectral_muon", layout, {"moe_experts": 4}, cut=cut)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("name", NAMES[1:])
def test_five_steps_of_the_other_rules(name: str, layout: str) -> None:
    found = check(NEW, name, LAYOUTS[layout])
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO)
def test_sumo(layout: str) -> None:
    ranks, groups, wrapping = LAYOUTS[layout]
    args = (NEW, "spectral_sumo")
    wanted = harness.run(1, runs.train, *args, {}, {}, {}, SUMO, pool=NEW)[0]
    found = harness.run(ranks, runs.train, *args, groups, wrapping, {}, SUMO, pool=NEW)
    for one in found:
        for key, value in wanted["parameters"].items():
            assert float((one["parameters"][key] - value).abs().max()) < BOUND, key
    for what in ("matrix_state", "polar_calls"):
        assert sum(one[what] for one in found) == wanted[what]


@pytest.mark.slow
def test_the_older_megatron() -> None:
    check(OLD, "spectral_muon", LAYOUTS["CP 2 x DP 2, distributed optimizer"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize(("name", "options"), [("spectral_muon", {}), ("spectral_sumo", SUMO)])
def test_a_run_goes_on_with_sequences_cut_or_whole(
    tmp_path: Any, name: str, options: dict[str, Any], wrapping: dict[str, Any]
) -> None:
    kwargs = {"options": options, "pool": NEW}
    wanted = harness.run(4, runs.save, str(tmp_path), NEW, name, CP, wrapping, **kwargs)[0]
    for ranks, groups in ((4, CP), (2, {}), (2, {"tp": 2})):
        args = (str(tmp_path), NEW, name, groups, wrapping)
        got = harness.run(ranks, runs.load, *args, **kwargs)[0]
        exact = groups is CP
        assert got["losses"] == pytest.approx(wanted, rel=0, abs=0 if exact else 1e-6), groups


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO)
def test_poet(layout: str, tmp_path: Any) -> None:
    ranks, groups, wrapping = LAYOUTS[layout]
    args = (NEW, groups, wrapping)
    for one in harness.run(ranks, poet_runs.train, *args, pool=NEW):
        compare(one, poet_alone(), 5e-6)
    wanted = harness.run(ranks, poet_runs.save, str(tmp_path), *args, pool=NEW)[0]
    got = harness.run(ranks, poet_runs.load, str(tmp_path), *args, pool=NEW)[0]
    assert got["losses"] == wanted["losses"]
