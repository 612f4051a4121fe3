"""SpectralSUMO in a DeepSpeed JSON: one process's numbers at every stage, and its checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.universal import to_universal
from tests.distributed.torch import layouts
from tests.distributed.torch.sumo_runs import OPTIONS, SETTINGS, STEPS
from tests.distributed.torch.sumo_runs import train as train_plain
from tests.reference import training
from tests.support import harness


def configured(
    stage: int, world: int, setting: str = "paper", universal: bool = False, **changes: Any
) -> dict[str, Any]:
    if universal:
        changes["checkpoint"] = {"load_universal": True}
    result = engine.config(stage, world, **changes)
    params = {**OPTIONS, "split": {"qkv": 3}, **SETTINGS[setting]}
    result["optimizer"] = {"type": "SpectralSUMO", "params": params}
    return result


def train(
    configuration: dict[str, Any],
    folder: str = "",
    first: int = 0,
    last: int = STEPS,
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    running = engine.engine_for(configuration, model=layouts.conditioned())
    base = running.basic_optimizer
    mine: dict[str, Any] | None = None
    if load is not None:
        path, mine = running.load_checkpoint(folder, tag=load)
        assert path is not None
    world, rank = dist.get_world_size(), dist.get_rank()
    losses = []
    for step in range(first, last):
        loss = running(layouts.tokens(step).chunk(world)[rank])
        running.backward(loss)
        running.step()
        losses.append(float(loss.detach()))
    if save is not None:
        running.save_checkpoint(folder, tag=save, client_state={"mine": 3})
    moments = {k for s in base.state.values() if "exp_avg_sq" not in s for k in s}
    result = {
        "parameters": engine.full_parameters(running), "losses": losses, "moments": moments,
        "elements": sum(p.values.numel() for p in base.matrix_parts() if p.is_primary),
        "client_state": mine, "polar_calls": base.polar_calls,
        "adams": sum("exp_avg_sq" in s for s in base.state.values()),
        "mapped": {
            key
            for r in base.all_routes
            if r.kind == "matrix" and getattr(r.parameter, "_hp_mapping", None)
            for key in r.parameter._hp_mapping.optim_fragment or {}
        },
    }  # fmt: skip
    running.destroy()
    return result


@functools.cache
def alone(setting: str) -> dict[str, Any]:
    return train_plain("one", SETTINGS[setting], zeros=True)


def check(ranks: list[dict[str, Any]], setting: str = "paper") -> None:
    wanted = alone(setting)
    for result in ranks:
        for name, value in wanted["parameters"].items():
            error = float((result["parameters"][name] - value).abs().max())
            assert error < (1e-6 if training.is_matrix(name) else 1e-5), (name, error)
        assert result["moments"] <= {"step"}
    elements = sum(numel for *_, numel, _ in wanted["parts"])
    assert sum(result["elements"] for result in ranks) == elements


@pytest.mark.parametrize(
    ("world", "stage", "setting"),
    [
        (3, 1, "criterion"), (4, 2, "subspace"), (2, 3, "gram"), (3, 3, "full"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, 0, "paper"), (2, 1, "paper"), (4, 3, "subspace"), (1, 2, "paper"),
                (4, 0, "subspace"), (3, 2, "paper"), (2, 3, "paper"), (3, 1, "gram"),
                (4, 3, "gram, criterion"),
            )
        ),
    ],
)  # fmt: skip
@pytest.mark.fast_cases("2-0-paper", "3-1-criterion", "4-2-subspace", "4-3-subspace", "1-2-paper")
def test_sharded_equals_one_process(world: int, stage: int, setting: str) -> None:
    """Every ZeRO stage on 1 to 4 ranks; a flat run's slabs travel under ``gram``."""
    plain = setting.removeprefix("gram, ").replace("gram", "paper")
    changes = {"sub_group_size": 3000} if stage == 3 else {}
    configuration = configured(stage, world, setting, zero=changes)
    check(harness.run(world, train, configuration), plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.fast_cases("3")
def test_a_checkpoint_on_the_same_ranks(stage: int, tmp_path: Path) -> None:
    """Saved in the middle of a period, loaded without another call, and nothing is lost."""
    configuration = configured(stage, 2, zero={"sub_group_size": 3000})
    whole = harness.run(2, train, configuration)
    folder = str(tmp_path)
    harness.run(2, train, configuration, folder, 0, 11, save="a")
    ranks = harness.run(2, train, configuration, folder, 11, load="a")
    check(ranks)
    for never_stopped, result in zip(whole, ranks, strict=True):
        assert result["losses"] == never_stopped["losses"][11:]  # bitwise
        assert {"mine": 3}.items() <= result["client_state"].items()
        assert "spectral_dist" not in result["client_state"]


@pytest.mark.parametrize("stages", [(1, 2), (3, 3)])
@pytest.mark.fast_cases("stages1")
def test_a_universal_checkpoint_on_other_ranks(stages: tuple[int, int], tmp_path: Path) -> None:
    folder = str(tmp_path)
    harness.run(2, train, configured(stages[0], 2), folder, 0, 9, save="a")
    tag = to_universal(tmp_path, "a")
    configuration = configured(stages[1], 4, universal=True)
    harness.run(4, train, configuration, folder, 9, 14, load=tag, save="b")
    tag = to_universal(tmp_path, "b")
    ranks = harness.run(3, train, configured(stages[1], 3, universal=True), folder, 14, load=tag)
    check(ranks)
    for result in ranks:
        assert result["mapped"] <= {"exp_avg", "exp_avg_sq"}


def test_errors_of_checkpoints(tmp_path: Path) -> None:
    """Another rank, or a checkpoint of another optimizer: said, and what to write instead."""
    folder = str(tmp_path)
    harness.run(2, train, configured(1, 2), folder, 0, 1, save="a")
    other = configured(1, 2)
    other["optimizer"]["params"]["rank"] = 5
    harness.run_refused(2, r"rank is 5 here, but 0\.5 in the", train, other, folder, 1, 2, load="a")
    muon = configured(1, 2)
    muon["optimizer"] = {"type": "SpectralMuon", "params": engine.OPTIONS}
    said = "another optimizer: SUMO, and this one is Muon"
    harness.run_refused(2, said, train, muon, folder, 1, 2, load="a")
    (tmp_path / "a" / "spectral_dist").rename(tmp_path / "elsewhere")
    said = r"has no matrix state.*load_optimizer_states"
    harness.run_refused(2, said, train, configured(1, 2), folder, 1, 2, load="a")
