"""A Megatron checkpoint without our matrix state is an error on every rank; then one with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.megatron import megatron_runs as runs
from tests.support import harness, together
from tests.support import megatron_model as models

NEW = "0.19.2"
GROUPS = {"tp": 2}
RULES = {"spectral_sumo": {"rank": 0.5}, "spectral_normuon": {}}


def load(wrong: str, right: str, name: str, strict: str, says: str) -> None:
    data, ddp, optimizer = runs.build(NEW, name, GROUPS, options=RULES[name])
    from megatron.core import dist_checkpointing

    def load_from(folder: str) -> None:
        content = runs.content(ddp, optimizer, True, None)
        options = {"strict": strict} if strict else {}
        state = dist_checkpointing.load(content, folder, **options)
        models.gpt_of(ddp).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    with together.failing(says) as raised:
        load_from(wrong)
    load_from(right)
    losses = [models.train_step(ddp, optimizer, models.batch(s, *data))[0] for s in range(3, 6)]
    assert together.told(repr(losses))[0] == repr(losses)
    raise raised[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("strict", ["", "ignore_all"])
def test_muons_checkpoint(name: str, strict: str, tmp_path: Path) -> None:
    """Whether Megatron would itself miss something, or is told to load what there is."""
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.mkdir()
    right.mkdir()
    args = (NEW, "spectral_muon", GROUPS)
    harness.run(2, runs.save, str(wrong), *args, pool=NEW)
    args = (NEW, name, GROUPS)
    harness.run(2, runs.save, str(right), *args, options=RULES[name], pool=NEW)
    says = f"was saved with another optimizer: spectral_muon, where this run has {name}"
    args = (str(wrong), str(right), name, strict, says)
    together.expect(says, load, *args, pool=NEW)
