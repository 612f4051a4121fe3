"""spectral_sumo under Megatron: one process's numbers, and matrix state in its checkpoints."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

NEW, OLD = "0.19.2", "0.16.1"
STEPS, BOUND = 20, 1e-6
OPTIONS = {"rank": 0.5, "period": 8}
GRAM = {"strategy": "gram"}
SUBSPACE = {"perp_scale": 0.0, "basis": "svd"}


@functools.cache
def alone(
    options: tuple[tuple[str, Any], ...] = (), experts: int | None = None, steps: int = STEPS
) -> dict[str, Any]:
    given = {**OPTIONS, **dict(options)}
    model = {"moe_experts": experts} if experts else {}
    args = (NEW, "spectral_sumo", {}, {}, model, given)
    return harness.run(1, runs.train, *args, steps=steps, pool=NEW)[0]


@pytest.mark.parametrize(
    ("version", "layout", "wrapping", "options"),
    [
        (NEW, (4, {}), DISTRIBUTED, SUBSPACE),
        (NEW, (4, {"tp": 2}), DISTRIBUTED, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (NEW, (2, {"tp": 2}), DISTRIBUTED, GRAM),
                (NEW, (4, {"tp": 2}), {}, GRAM),
                (NEW, (4, {"tp": 2, "pp": 2}), {}, {}),
                (NEW, (2, {}), {}, {}),
                (NEW, (2, {"tp": 2}), {}, {}),
                (NEW, (4, {"tp": 2}), {}, SUBSPACE | GRAM),
                (OLD, (4, {"tp": 2}), DISTRIBUTED, GRAM),
            )
        ),
    ],
)
@pytest.mark.fast_cases("0.19.2-layout0-wrapping0-options0")
def test_twenty_steps_are_those_of_one_process(version, layout, wrapping, options):
    """Sketches and phases go by names in the whole model, so pipeline stages agree, too."""
    ranks, groups = layout
    plain = {k: v for k, v in options.items() if k != "strategy"}
    wanted = alone(tuple(plain.items()))
    args = (version, "spectral_sumo", groups, wrapping, {}, {**OPTIONS, **options})
    found = harness.run(ranks, runs.train, *args, steps=STEPS, pool=version)
    for one in found:
        for key, value in wanted["parameters"].items():
            error = float((one["parameters"][key] - value).abs().max())
            assert error < BOUND, (key, error)
        assert one["momentum"] == 0
    assert sum(one["matrix_state"] for one in found) == wanted["matrix_state"]
    assert sum(one["polar_calls"] for one in found) == wanted["polar_calls"]


@pytest.mark.slow
def test_experts_of_several_ranks() -> None:
    """Ten steps: tokens are added up in another order, and in 20 that has grown to 4e-6."""
    wanted = alone(experts=4, steps=10)
    args = (NEW, "spectral_sumo", {"ep": 2}, {}, {"moe_experts": 4}, OPTIONS)
    found = harness.run(2, runs.train, *args, steps=10, pool=NEW)
    for one in found:
        for key, value in one["parameters"].items():
            assert float((value - wanted["parameters"][key]).abs().max()) < BOUND, key
    assert sum(one["matrix_state"] for one in found) == wanted["matrix_state"]


def save(folder: str, *args: Any, **kwargs: Any) -> list[float]:
    return runs.save(folder, *args, options={**OPTIONS, **kwargs.pop("options", {})}, **kwargs)


def load(folder: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return runs.load(folder, *args, options={**OPTIONS, **kwargs.pop("options", {})}, **kwargs)


TARGETS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP 2 x DP 2": (4, {"tp": 2}, {}),
    "DP 4": (4, {}, {}),
    "TP 2, in slabs": (2, {"tp": 2}, GRAM),
    "PP 2": (2, {"pp": 2}, {}),
    "alone": (1, {}, {}),
}


@pytest.mark.parametrize(
    ("version", "wrapping", "saved"),
    [
        (NEW, {}, GRAM),
        pytest.param(OLD, DISTRIBUTED, {}, marks=pytest.mark.slow),
        pytest.param(NEW, DISTRIBUTED, GRAM, marks=pytest.mark.slow),
        pytest.param(NEW, {}, {}, marks=pytest.mark.slow),
        pytest.param(OLD, {}, GRAM, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_losses_are_those_of_the_run_that_never_stopped(tmp_path, version, wrapping, saved):
    """Saved at TP 2 x DP 2, at owners or in slabs; loaded by other owners, or in slabs."""
    args = (version, "spectral_sumo", {"tp": 2}, wrapping)
    wanted = harness.run(4, save, str(tmp_path), *args, options=saved, pool=version)[0]
    for target in TARGETS if version == NEW else ["DP 4", "TP 2, in slabs"]:
        ranks, groups, options = TARGETS[target]
        args = (str(tmp_path), version, "spectral_sumo", groups, wrapping)
        got = harness.run(ranks, load, *args, options=options, pool=version)[-1]
        exact = target == "TP 2 x DP 2" and not saved
        assert got["losses"] == pytest.approx(wanted, rel=0, abs=0 if exact else 2e-6), target
        assert got["steps"] == 3
        assert "exp_avg" not in got["matrix keys"]


@pytest.mark.slow
def test_experts_carry_theirs(tmp_path):
    kwargs = {"model": {"moe_experts": 4}, "pool": NEW}
    args = (str(tmp_path), NEW, "spectral_sumo")
    wanted = harness.run(2, save, *args, {"ep": 2}, **kwargs)[0]
    got = harness.run(4, load, *args, {"ep": 4}, **kwargs)[0]
    assert got["losses"] == pytest.approx(wanted, rel=0, abs=2e-6)


# -- the format by itself: uneven rows, copies, what is not there

SHAPES = {
    "layers.0.qkv/0": {"basis": (10, 3), "moment": (3, 4), "norm": (), "step": ()},
    "layers.1.fc2": {"basis": (7, 2), "moment": (2, 5), "norm": (), "step": ()},
}
FIRST, SECOND = SHAPES
# of each matrix: its owner, and where the basis' rows are cut, if so
DIVISIONS: dict[str, dict[str, tuple[int, tuple[int, ...] | None]]] = {
    "two owners": {FIRST: (0, None), SECOND: (1, None)},
    "one": {FIRST: (0, None), SECOND: (0, None)},
    "rows": {FIRST: (2, (0, 1, 6, 6, 10)), SECOND: (1, (0, 0, 3, 6, 7))},
    "rows of two": {FIRST: (0, (0, 7, 10)), SECOND: (1, (0, 2, 7))},
}


def full(name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) + 7 * len(kind))
    made = torch.randn(shape, generator=generator)
    return made if kind != "step" else torch.tensor(7, dtype=torch.int64)


def divided(division: str, empty: bool = False) -> list[Any]:
    """This rank's parts under a division; scalars are on every rank that has rows."""
    from spectral_dist.core.matrix_state import MatrixStatePart

    rank, parts = dist.get_rank(), []
    for name, (owner, bounds) in DIVISIONS[division].items():
        for kind, shape in SHAPES[name].items():
            whole = full(name, kind, shape)
            whole = torch.full_like(whole, -1) if empty else whole.clone()
            if kind == "basis" and bounds is not None:
                begin, end = bounds[rank : rank + 2]
                if begin < end:
                    parts.append(
                        MatrixStatePart(name, kind, shape, (begin, 0), whole[begin:end], True)
                    )
            elif rank == owner or (bounds is not None and not shape):
                zeros = (0,) * len(shape)
                parts.append(MatrixStatePart(name, kind, shape, zeros, whole, rank == owner))
    return parts


def content(parts: list[Any] | None, loading: bool) -> dict[str, Any]:
    from spectral_dist.integrations.megatron import matrix_checkpoint

    found: dict[str, Any] = {"param_groups": []}
    if parts is not None:  # that of another optimizer
        found[matrix_checkpoint.ENTRY] = matrix_checkpoint.sharded(parts, (), loading)
    return {"optimizer": found}


def store(version: str, folder: str, division: str) -> None:
    megatron_cpu.install(version)
    models.parallel()
    from megatron.core import dist_checkpointing

    parts = divided(division) if division else None
    dist_checkpointing.save(content(parts, False), folder)


def restore(version: str, folder: str, division: str, **options: Any) -> Any:
    """Whether each part has the values that it is to have."""
    megatron_cpu.install(version)
    models.parallel()
    from megatron.core import dist_checkpointing

    from spectral_dist.integrations.megatron import matrix_checkpoint

    parts = divided(division, empty=True)
    try:
        loaded = dist_checkpointing.load(content(parts, True), folder, **options)
        matrix_checkpoint.fill(parts, loaded["optimizer"][matrix_checkpoint.ENTRY])
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    pairs = zip(parts, divided(division), strict=True)
    return [torch.equal(part.values, wanted.values) for part, wanted in pairs]


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("saved", ["two owners", "rows"])
def test_any_division_loads_what_any_other_saved(tmp_path, saved, version):
    harness.run(4, store, version, str(tmp_path), saved, pool=version)
    for ranks, division in ((4, "rows"), (2, "two owners"), (2, "rows of two"), (1, "one")):
        found = harness.run(ranks, restore, version, str(tmp_path), division, pool=version)
        assert all(all(one) for one in found), (division, found)
        assert sum(map(len, found)) >= 8


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_a_checkpoint_without_it_is_an_error(tmp_path, version):
    harness.run(1, store, version, str(tmp_path), "", pool=version)
    found = harness.run(1, restore, version, str(tmp_path), "one", pool=version)[0]
    assert "optimizer.spectral.basis.layers.0.qkv/0" in found
    options = {"strict": "ignore_all"}
    found = harness.run(1, restore, version, str(tmp_path), "one", pool=version, **options)[0]
    assert found.startswith("ValueError: the checkpoint has no optimizer.spectral.basis"), found


def legacy() -> str:
    """What Megatron's older format, which each rank writes by itself, says."""
    _, _, optimizer = runs.build(NEW, "spectral_sumo", options=OPTIONS)
    for inner in runs.inner(optimizer):
        inner.prepare()
    try:
        optimizer.state_dict()
    except ValueError as error:
        return str(error)
    return ""


def test_the_older_format_is_an_error() -> None:
    assert "--ckpt-format torch_dist" in harness.run(1, legacy, pool=NEW)[0]
