"""Checkpoints of another optimizer are refused on every rank, and never taken in silence."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.support import harness
from tests.support import megatron_model as models

NEW, OLD = "0.19.2", "0.16.1"
TP = {"tp": 2}
FORMATS = {
    "": ({}, None),
    "fully reshardable": (DISTRIBUTED, "fully_reshardable"),
    "of one parallelism": (DISTRIBUTED, "dp_reshardable"),
}


def refused(folder, version, name, wrapping, sharding):
    """What loading says, and whether any parameter has changed by then."""
    data, ddp, optimizer = runs.build(version, name, TP, wrapping)
    from megatron.core import dist_checkpointing

    models.train_step(ddp, optimizer, models.batch(0, *data))  # Megatron's Adam needs a state
    before = [p.detach().clone() for p in ddp.parameters()]
    said = "nothing was raised"
    try:
        dist_checkpointing.load(runs.content(ddp, optimizer, True, sharding), folder)
    except ValueError as error:
        said = str(error)
    same = all(map(torch.equal, before, ddp.parameters()))
    return said, same


@pytest.mark.parametrize(
    ("version", "saved", "format"),
    [
        (NEW, "adam", "of one parallelism"),
        (NEW, "spectral_muon", "of one parallelism"),
        (NEW, "adam", ""),
        *(
            pytest.param(version, saved, format, marks=pytest.mark.slow)
            for version, saved, format in (
                (NEW, "spectral_muon", ""), (NEW, "adam", "fully reshardable"),
                (NEW, "spectral_muon", "fully reshardable"), (NEW, "spectral_sumo", ""),
                (NEW, "spectral_sumo", "of one parallelism"), (OLD, "adam", ""),
                (OLD, "spectral_muon", ""), (OLD, "adam", "of one parallelism"),
                (OLD, "spectral_muon", "fully reshardable"),
            )
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, version, saved, format):
    wrapping, sharding = FORMATS[format]
    harness.run(
        2, runs.save, str(tmp_path), version, saved, TP, wrapping, sharding=sharding, pool=version
    )
    wanted = "spectral_muon" if saved == "adam" else "adam"
    names = {"adam": "Megatron's own optimizer"}
    others = [wanted] if saved != "spectral_sumo" else [wanted, "spectral_muon"]
    for other in others:
        found = harness.run(
            2, refused, str(tmp_path), version, other, wrapping, sharding, pool=version
        )
        for said, same in found:
            assert f"saved with another optimizer: {names.get(saved, saved)}" in said
            assert f"this run has {names.get(other, other)}" in said
            assert "--no-load-optim" in said
            assert "--finetune" in said
            assert same


def legacy(name):
    """Loading what the other one has, as of a checkpoint that one rank wrote."""
    options = {} if name == "adam" else {"replicate_momentum": True}
    found = {}
    for kind in ("adam", "spectral_muon"):
        data, ddp, optimizer = runs.build(
            NEW, kind, options=options if kind == name else {"replicate_momentum": True}
        )
        models.train_step(ddp, optimizer, models.batch(0, *data))
        found[kind] = optimizer
    other = found["spectral_muon" if name == "adam" else "adam"]
    try:
        found[name].load_state_dict(other.state_dict())
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("name", ["adam", "spectral_muon"])
def test_so_is_one_of_the_format_torch(name):
    for text in harness.run(2, legacy, name, pool=NEW):
        assert "saved with another optimizer" in text
