"""What ranks must have alike from the start is looked at in the first step, and told by all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.support import together
from tests.support.together import LAYOUTS, MATRIX, OptimizedModel, expect, quiet
from tests.support.together import plain_steps as steps

# -- what all ranks must have alike from the start

DIFFERENT: dict[str, list[dict[str, Any]]] = {
    "lr": [{"lr": 0.02}, {"lr": 0.01}],
    "weight_decay": [{}, {"weight_decay": 0.0}],
    "momentum": [{}, {"momentum": 0.9}],
    "scale": [{}, {"scale": "original"}],
    "polar": [{}, {"polar": "svd"}],
    "scalar_lr": [{}, {"scalar_lr": 0.001}],
    "betas": [{}, {"betas": (0.9, 0.99)}],
    "check_finite": [{}, {}],
    "optimizer": [{}, {"kind": "SUMO"}],
    "optimizer ": [{"kind": "ROOT"}, {"kind": "NorMuon"}],
    "merge_every": [{"kind": "POET"}, {"kind": "POET", "merge_every": 3}],
}


def differing(layout: str, name: str, check_finite: bool) -> None:
    each = [{"check_finite": check_finite, **options} for options in DIFFERENT[name]]
    if name == "check_finite":
        each[1]["check_finite"] = not check_finite
    with quiet():
        trial = OptimizedModel(layout, **each[torch.distributed.get_rank()])
        trial.backward(0)
        says = f"`{name.strip()} "
        error = together.expect_failure(trial, says, trial.optimizer.step)
        trial.build(**{"kind": "Muon", **each[0]})
        for number in range(2):
            trial.step(number)
        wanted = steps(layout, 2, **each[0])
    assert together.same(trial.weights(), wanted.weights())
    raise error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("check_finite", [True, False])
def test_options_that_differ(layout: str, name: str, check_finite: bool) -> None:
    """Told in the first step, whichever rank it is that would not ask."""
    expect("do not agree on the optimizer's options", differing, layout, name, check_finite)


# -- where parameters are, looked at in the first step


def scattered(trial: OptimizedModel) -> None:
    """Another order of elements on rank 1, where every rank has the whole matrix."""
    if trial.rank == 1:
        p = trial.parameter(MATRIX)
        p.data = p.data.T.contiguous().T


def gathered(trial: OptimizedModel) -> None:
    p = trial.parameter(MATRIX)
    p.data = p.data.contiguous()


def tiles(rows: int, contiguous: bool) -> torch.nn.Parameter:
    """A DTensor of rows that this rank says is of 2 x ``rows``."""
    mesh = init_device_mesh("cpu", (2,))
    tile = torch.ones(rows, 6) if contiguous else torch.ones(6, rows).T
    return torch.nn.Parameter(DTensor.from_local(tile, mesh, [Shard(0)], run_check=False))


def placed(layout: str, what: str, check_finite: bool) -> None:
    with quiet():
        trial = OptimizedModel("one" if layout != "ddp" else layout, check_finite=check_finite)
        options = {"lr": 0.02, "check_finite": check_finite}
        if layout == "ddp":
            trial.backward(0)
            scattered(trial)
        else:
            odd = trial.rank == 1
            rows = 5 if odd and what == "shape" else 4
            trial.model[1].weight = tiles(rows, not (odd and what == "order"))
            if layout == "one":  # replicas, and no wrapper that has looked at them
                whole = torch.ones(rows, 6)
                trial.model[1].weight = torch.nn.Parameter(whole)
                options["process_group"] = torch.distributed.group.WORLD
            trial.build("Muon", **options)
            for p in trial.model.parameters():
                p.grad = torch.ones_like(p)
        says = "is not contiguous" if what == "order" else "do not agree"
        error = together.expect_failure(trial, says, trial.optimizer.step)
        if layout == "ddp":
            gathered(trial)
            trial.step(0)
            assert together.same(trial.weights(), steps(layout, 1).weights())
            raise error
        trial.model[1].weight = tiles(4, True)
        trial.build("Muon", lr=0.02, check_finite=check_finite)
        for p in trial.model.parameters():
            p.grad = torch.ones_like(p)
        trial.optimizer.step()
    raise error


PLACES = [("ddp", "order"), ("tiles", "order"), ("tiles", "shape"), ("one", "shape")]


@pytest.mark.parametrize(("layout", "what"), PLACES)
@pytest.mark.parametrize("check_finite", [True, False])
def test_a_parameter_that_lies_otherwise(layout: str, what: str, check_finite: bool) -> None:
    says = "is not contiguous" if what == "order" else "on rank 0 but"
    expect(says, placed, layout, what, check_finite)
