"""Lightning's Trainer trains as a loop of our own does, saves and resumes, on 1 and 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from tests.distributed.lightning import trainer_runs
from tests.support import harness

LAYOUTS = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp_full": 2}


def run(world: int, function: Any, *args: Any) -> dict[str, Any]:
    first: dict[str, Any]
    first, *others = harness.run(world, function, *args, pool="lightning")
    for other in others:
        close(other, first, 0.0)
    return first


def close(got: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=0, atol=bound)


BOUNDS = {"Muon": 1e-6, "SUMO": 1e-11, "POET": 1e-11}


@pytest.mark.parametrize("name", trainer_runs.OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("ddp-SUMO", "fsdp-Muon", "fsdp-POET", "fsdp_full-SUMO")
def test_the_trainer_does_what_a_loop_does(layout: str, name: str, tmp_path: Path) -> None:
    world, folder = LAYOUTS[layout], str(tmp_path)
    whole = run(world, trainer_runs.whole, folder, layout, name)
    close(whole, trainer_runs.by_loop(name), BOUNDS[name])
    if (layout, name) == ("fsdp_full", "POET"):  # Lightning leaves out a layer's extra state
        with pytest.raises(harness.RankError, match="in place of the layer's extra state"):
            run(world, trainer_runs.resumed, folder, layout, name)
        return
    rest = run(world, trainer_runs.resumed, folder, layout, name)
    close(rest, whole, 0.0)
    half = len(whole["losses"]) // 2
    assert rest["losses"] == whole["losses"][half:]


@pytest.mark.parametrize("name", trainer_runs.OPTIONS)
@pytest.mark.parametrize("layout", ["fsdp", "fsdp_full"])
@pytest.mark.slow
def test_two_ranks_save_and_one_resumes(layout: str, name: str, tmp_path: Path) -> None:
    if (layout, name) == ("fsdp_full", "POET"):
        pytest.skip("refused: see above")
    whole = run(2, trainer_runs.whole, str(tmp_path), layout, name)
    close(run(1, trainer_runs.resumed, str(tmp_path), layout, name), whole, BOUNDS[name])


@pytest.mark.parametrize("name", ["Muon", "SUMO"])
@pytest.mark.parametrize("layout", ["one", "fsdp", "fsdp_full"])
@pytest.mark.slow
def test_layers_are_unfrozen_on_the_way(layout: str, name: str, tmp_path: Path) -> None:
    whole = run(LAYOUTS[layout], trainer_runs.thawed, str(tmp_path), layout, name)
    close(whole, trainer_runs.by_loop(name, thaw=True), BOUNDS[name])


@pytest.mark.slow
def test_groups_that_lightning_replaces_are_refused(tmp_path: Path) -> None:
    run(1, trainer_runs.thawed, str(tmp_path), "one", "Muon")
    with pytest.raises(harness.RankError, match="something has replaced the list"):
        run(1, trainer_runs.rethawed, str(tmp_path), "one", "Muon")
