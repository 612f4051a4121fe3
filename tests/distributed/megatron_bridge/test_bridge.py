"""What Megatron-Bridge sets up trains as Megatron does on one rank, saves and resumes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.megatron_bridge import bridge_runs
from tests.support import harness

if importlib.util.find_spec("megatron") is None or not importlib.util.find_spec("megatron.bridge"):
    pytest.skip("megatron-bridge is not installed", allow_module_level=True)

POOL = "bridge"


def run(world: int, function: Any, *args: Any) -> Any:
    return harness.run(world, function, *args, pool=POOL)[0]


@pytest.mark.parametrize("name", bridge_runs.OPTIONS)
@pytest.mark.fast_cases("spectral_muon", "spectral_sumo")
def test_bridge_does_what_megatron_does(name: str, tmp_path: Path) -> None:
    whole = run(2, bridge_runs.by_bridge, str(tmp_path), name)
    assert whole == pytest.approx(run(1, bridge_runs.by_megatron, name), rel=1e-6)
    assert run(2, bridge_runs.resumed, str(tmp_path), name) == pytest.approx(whole[-3:], abs=1e-7)


@pytest.mark.slow
def test_the_name_alone_takes_the_default_options() -> None:
    plain = run(2, bridge_runs.by_name, "spectral_normuon")
    assert plain == run(2, bridge_runs.by_name_options, "spectral_normuon")


def test_what_finalize_refuses() -> None:
    option, value, setting, name, foreign = run(2, bridge_runs.refusals)
    assert "unknown option 'momentun'; did you mean 'momentum'" in option
    assert "momentum" in value
    assert "OptimizerConfig(lr=...)" in setting
    assert "'spectral_moun'; did you mean 'spectral_muon'" in name
    assert "'adam'" in foreign


def test_other_versions_are_refused() -> None:
    older, newer = run(2, bridge_runs.versions)
    assert "0.5.0 is" in older
    assert "0.7.0 is" in newer
