"""Strategy ``split`` under Megatron: ranks share matrices, with the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest

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
