"""Strategy ``split`` under Megatron: ranks share matrices, with the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral_dist.core import teams
from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron.test_megatron_equality import LAYOUTS, MATRICES, NEW, check
from tests.support import harness


def train(*args: Any) -> dict[str, Any]:
    """Train as ``runs.train``, but share every matrix: they are too many to be shared otherwise."""
    original = teams.team_sizes
    teams.team_sizes = lambda able, load, length, rows: [1 + fine for fine in able]
    try:
        return runs.train(*args)
    finally:
        teams.team_sizes = original


@pytest.mark.parametrize(
    "layout",
    [
        "DP 2",
        "TP 2 x DP 2, distributed optimizer",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("DP 2, distributed optimizer", "TP 2", "TP 2 x DP 2", "TP 4")
        ),
    ],
)
def test_five_steps_are_those_of_one_process(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = harness.run

    def run(ranks: int, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run what shares matrices, where there are several ranks."""
        return original(ranks, train if ranks > 1 else function, *args, **kwargs)

    monkeypatch.setattr(harness, "run", run)
    found = check(NEW, "spectral_muon", LAYOUTS[layout], options={"strategy": "split"})
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


TWO_HOSTS = {"ranks_per_host": 2, "message": 1.0}


@pytest.mark.slow
def test_two_steps_are_bitwise_one() -> None:
    """On two hosts of two ranks, where messages take so long that they go within hosts first."""
    ranks, groups, wrapping = LAYOUTS["TP 4"]
    found = []
    for machine in ({}, {"machine": TWO_HOSTS}):
        options = {"strategy": "owner", **machine}
        args = (NEW, "spectral_muon", groups, wrapping, {}, options)
        found.append(harness.run(ranks, runs.train, *args, pool=NEW))
    for at_once, in_two in zip(*found, strict=True):
        for key, value in at_once["parameters"].items():
            assert torch.equal(in_two["parameters"][key], value), key
        assert in_two["all_to_alls"] == 2 * at_once["all_to_alls"] > 0


def test_auto_with_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some matrices are in slabs of all ranks, others in those of teams."""
    original = harness.run

    def run(ranks: int, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run what shares matrices, where there are several ranks."""
        return original(ranks, train if ranks > 1 else function, *args, **kwargs)

    monkeypatch.setattr(harness, "run", run)
    options = {"machine": {"bandwidth": 1.0}}
    found = check(NEW, "spectral_muon", LAYOUTS["TP 2 x DP 2"], options=options)
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES
    for one in found:
        assert one["strategies"] == {"gram", "split"}
