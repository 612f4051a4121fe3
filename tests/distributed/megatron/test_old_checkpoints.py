"""Checkpoints of Megatron that commit 2d3f994 wrote: as in ``../test_old_checkpoints.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import old_checkpoints as old
from tests.distributed.test_old_checkpoints import check
from tests.support import harness


@pytest.mark.parametrize("name", old.MEGATRON_CASES)
@pytest.mark.fast_cases("sumo_tp2", "root_tp2")
def test_in_the_same_layout(name: str, tmp_path: Path) -> None:
    path, wanted = old.unpack("megatron", name, tmp_path)
    ranks, *case = old.MEGATRON_CASES[name]
    args = (path, 2, *case)
    for weights in harness.run(ranks, old.resume_megatron, *args, pool=old.MEGATRON):
        check(weights, wanted)


@pytest.mark.parametrize("name", ["muon_tp2", "sumo_tp2"])
@pytest.mark.fast_cases("muon_tp2")
def test_without_tensor_parallelism(name: str, tmp_path: Path) -> None:
    path, wanted = old.unpack("megatron", name, tmp_path)
    _, *case = old.MEGATRON_CASES[name]
    args = (path, 1, *case)
    (weights,) = harness.run(1, old.resume_megatron, *args, pool=old.MEGATRON)
    check(weights, wanted)
