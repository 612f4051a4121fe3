"""hpZ: ZeRO-3 with a second copy of the parameters, sharded over two of four ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.deepspeed import engine, poet_runs
from tests.distributed.torch import layouts
from tests.reference import training
from tests.support import harness

STEPS = 6
SCALARS = {"weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
RULES: dict[str, dict[str, Any]] = {
    "SpectralMuon": {"lr": 0.02},
    "SpectralPolarGrad": {"lr": 0.1},
    "SpectralROOT": {"lr": 0.02},
    "SpectralSUMO": {"lr": 0.01, "rank": 0.5, "period": 2},
}
MATRICES = 2 * 4
run = functools.partial(harness.run, 4)


def config(kind: str, **changes: Any) -> dict[str, Any]:
    zero = {"zero_hpz_partition_size": 2, **changes.pop("zero", {})}
    result = engine.config(3, 4, zero=zero, **changes)
    result["optimizer"] = {"type": kind, "params": {**SCALARS, **RULES.get(kind, {})}}
    if kind == "AdamW":
        result["optimizer"]["params"] = {"lr": 0.01, "torch_adam": True}
    return result


def train(
    configuration: dict[str, Any],
    first: int = 0,
    last: int = STEPS,
    folder: str = "",
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    from deepspeed.utils import groups

    running = engine.engine_for(configuration, model=layouts.conditioned(odd=False))
    if load is not None:
        assert running.load_checkpoint(folder, tag=load)[0] is not None
    losses, secondary = [], 0
    for step in range(first, last):
        loss = running(layouts.tokens(step).chunk(dist.get_world_size())[dist.get_rank()])
        secondary += sum(  # parameters of which there is a second copy
            getattr(p, "ds_secondary_tensor", None) is not None for p in running.module.parameters()
        )
        running.backward(loss)
        running.step()
        losses.append(float(loss.detach()))
    if save is not None:
        running.save_checkpoint(folder, tag=save)
    base = running.basic_optimizer
    result = {
        "parameters": engine.full_parameters(running), "losses": losses, "secondary": secondary,
        "polar_calls": getattr(base, "polar_calls", 0),
    }  # fmt: skip
    running.destroy()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # else later engines of any stage 3 use it
    return result


@functools.cache
def alone(kind: str, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """The optimizer in one process of plain torch."""
    import spectral_dist

    model = layouts.conditioned(odd=False)
    if kind == "AdamW":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        cls = getattr(spectral_dist, kind.removeprefix("Spectral"))
        optimizer = cls(spectral_dist.param_groups(model), **SCALARS, **RULES[kind])
    for step in range(STEPS):
        optimizer.zero_grad()
        model(layouts.tokens(step)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def check(ranks: list[dict[str, Any]], wanted: dict[str, torch.Tensor]) -> None:
    for result in ranks:
        assert result["secondary"] > 0
        for name, value in wanted.items():
            bound = 1e-6 if training.is_matrix(name) else 1e-5
            assert (result["parameters"][name] - value).abs().max() < bound, name


@pytest.mark.parametrize("sub_groups", [False, True])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.fast_cases("SpectralMuon-True")
def test_second_copies_equal_one_process(kind: str, sub_groups: bool) -> None:
    zero = {"sub_group_size": 3000} if sub_groups else {}
    ranks = run(train, config(kind, zero=zero, gradient_clipping=0.3))
    check(ranks, alone(kind, 0.3))
    assert sum(result["polar_calls"] for result in ranks) == STEPS * MATRICES


@pytest.mark.slow
def test_deepspeed_itself_equals_one_process() -> None:
    for result in run(train, config("AdamW")):
        for name, value in alone("AdamW").items():
            torch.testing.assert_close(result["parameters"][name], value, rtol=0, atol=5e-6)


@pytest.mark.slow  # on ranks of its own, since the group stays
def test_poet() -> None:
    """A merge writes whole weights, of which there are second copies, too."""
    configuration = poet_runs.configured(3, 4, zero={"zero_hpz_partition_size": 2})
    poet_runs.check(harness.run(4, poet_runs.train, configuration, pool="hpz"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SpectralMuon", "SpectralSUMO"])
def test_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    whole = run(train, config(kind))
    run(train, config(kind), last=2, folder=str(tmp_path), save="two")
    rest = run(train, config(kind), first=2, folder=str(tmp_path), load="two")
    for result, wanted in zip(rest, whole, strict=True):
        assert result["losses"] == wanted["losses"][2:]
        for name, value in wanted["parameters"].items():
            assert torch.equal(result["parameters"][name], value), name
