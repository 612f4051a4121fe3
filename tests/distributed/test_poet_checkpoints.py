"""POET's runs that stop, in mid-cycle or at a merge, and go on elsewhere in plain torch."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_dist
from spectral_dist import checkpoint, poet
from tests.distributed.torch import layouts, poet_torch
from tests.distributed.torch.checkpoint_legs import same, states
from tests.support import harness
from tests.support.quiet import quiet

CUTS = (2, 3, 5)
"""Just before the first merge (which is in the third step), just after it, and in mid-cycle."""


def leg(
    layout: str, setting: str, first: int, last: int, load: str = "", save: str = "", **more: Any
) -> dict[str, Any]:
    """Load folder ``load`` if given, take steps [first, last), save into ``save`` if given."""
    placed, optimizer = poet_torch.start(layout, setting, **more)
    if load:
        with torch.no_grad():
            for p in placed.named.values():  # all is to come from the checkpoint
                p.add_(0.125)
        assert checkpoint.load(load, placed.model, optimizer) == {"step": first}
    losses = poet_torch.steps(placed, optimizer, first, last)
    if save:
        checkpoint.save(save, placed.model, optimizer, step=last)
    return {
        "losses": losses, "parameters": placed.full(), "states": states(optimizer),
        "merges": poet_torch.merges(optimizer),
    }  # fmt: skip


def legs(world: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    here = args[0] == "one"
    return [leg(*args, **kwargs)] if here else harness.run(world, leg, *args, **kwargs)


@functools.cache
def whole(
    layout: str, world: int, setting: str, count: int = poet_torch.STEPS
) -> list[dict[str, Any]]:
    return legs(world, layout, setting, 0, count, dtype=torch.float32)


# -- on the same ranks: every bit


@pytest.mark.parametrize(
    ("layout", "world", "setting", "cut"),
    [
        pytest.param(layout, world, setting, cut, marks=[pytest.mark.slow] * (
            (layout, world, setting, cut) != ("fsdp", 2, "fast", 5)))
        for layout, world in (("one", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4))
        for setting in ("fast", "fully, memory")
        for cut in CUTS
    ],
)  # fmt: skip
def test_bit_by_bit(layout: str, world: int, setting: str, cut: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    before = legs(world, layout, setting, 0, cut, save=folder, dtype=torch.float32)
    after = legs(
        world, layout, setting, cut, poet_torch.STEPS, load=folder, dtype=torch.float32
    )  # fmt: skip
    for wanted, one, two in zip(whole(layout, world, setting), before, after, strict=True):
        assert one["losses"] + two["losses"] == wanted["losses"]
        assert two["merges"] == wanted["merges"] == 2
        same({"": two["parameters"]}, {"": wanted["parameters"]})
        same(two["states"], wanted["states"])


# -- on other ranks, in other layouts


WAYS = [
    [("fsdp", 2), ("ddp", 2), ("one", 1), ("fsdp", 4)],
    [("ddp", 2), ("fsdp", 4), ("hsdp", 4), ("ddp", 1)],
    [("one", 1), ("ddp", 4), ("fsdp", 3), ("fsdp", 1)],
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(f"{n}{w}" for n, w in way))
@pytest.mark.parametrize("setting", ["fast", "fully, memory"])
def test_through_layouts(way: list[tuple[str, int]], setting: str, tmp_path: Path) -> None:
    wanted = poet_torch.train("one", setting)
    losses: list[float] = []
    load = ""
    for number, (layout, world) in enumerate(way):
        first, save = 2 * number, str(tmp_path / str(number))
        found = legs(world, layout, setting, first, first + 2, load=load, save=save)
        losses += [
            sum(each) / world for each in zip(*(r["losses"] for r in found), strict=True)
        ]  # fmt: skip
        load = save
    assert losses == pytest.approx(wanted["losses"], abs=1e-10, rel=0)
    for result in found:
        assert result["merges"] == 2
        assert poet_torch.largest(result["parameters"], wanted["parameters"]) < 1e-10


@pytest.mark.slow
def test_weights_are_in_their_own_order(tmp_path: Path) -> None:
    """Just after a merge, when the skew is zero, the file's W is the exported weight."""
    harness.run(2, leg, "fsdp", "fast", 0, poet_torch.EVERY, save=str(tmp_path))
    placed, optimizer = poet_torch.start("one")
    checkpoint.load(tmp_path, placed.model, optimizer)
    wanted = poet_torch.train("one", "fast", count=poet_torch.EVERY)["exported"]
    for name, value in wanted.items():
        assert float((placed.named[name].detach() - value).abs().max()) < 1e-12


# -- torch's own, in one process


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("setting", ["fast", "memory"])
def test_torchs_own_state_dicts(cut: int, setting: str) -> None:
    placed, optimizer = poet_torch.start("one", setting, torch.float32)
    poet_torch.steps(placed, optimizer, 0, cut)
    file = io.BytesIO()
    torch.save([placed.model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    again, other = poet_torch.start("one", setting, torch.float32)
    again.backward(0)  # what is kept of old values must not be used
    again.model.load_state_dict(model)
    other.load_state_dict(state)
    poet_torch.steps(again, other, cut, poet_torch.STEPS)
    wanted = whole("one", 1, setting)[0]
    assert poet_torch.merges(other) == 2
    same({"": again.full()}, {"": wanted["parameters"]})
    same(states(other), wanted["states"])


# -- what does not fit


def attempt(load: str, optimizer: str, **settings: Any) -> tuple[str, bool]:
    """What is said, and whether the model was left as it was."""
    model = layouts.conditioned(odd=False)
    if optimizer == "POET":
        given = {"block": 8, "segments": 1, "scalars": [r"layers\.1\.(up|down)"], **settings}
        model = poet.convert(model, **given)
    placed = layouts.fsdp(model)
    options: dict[str, Any] = {} if optimizer == "POET" else {"lr": 0.01}
    with quiet():
        made = getattr(spectral_dist, optimizer)(
            spectral_dist.param_groups(placed.model), **options
        )  # fmt: skip
        before = copy.deepcopy(placed.full())
        try:
            checkpoint.load(load, placed.model, made)
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return said, all(torch.equal(v, before[n]) for n, v in placed.full().items())


def saved(folder: str, optimizer: str, **settings: Any) -> Tensor:
    """A weight."""
    model = layouts.conditioned(seed=1, odd=False)
    if optimizer == "POET":
        given = {"block": 8, "scalars": [r"layers\.1\.(up|down)"], **settings}
        model = poet.convert(model, **given)
    with quiet():
        made = getattr(spectral_dist, optimizer)(spectral_dist.param_groups(model))
        checkpoint.save(folder, model, made)
    return model.layers[0].up.weight


WRONG = {
    "block": ({"block": 4}, "the block of inputs is 4 here, but 8 in the checkpoint"),
    "blocks": ({"blocks": {"qkv": (8, 12)}}, "the block of outputs is 12 here, but 8 in the"),
    "seed": ({"seed": 3}, "seed is 3 here, but 0 in the checkpoint; convert the model with"),
    "segments": ({"segments": 3, "scalars": [r"layers\.1\.(up|down)", r"\.(up|down)"]},
                 "is rotated by POET in"),
    "segments 1": ({"segments": 1, "order": 3}, "order is 2 here, but 3 in the checkpoint"),
    "fewer layers": ({"scalars": [r"layers\.1"]}, "layers.1.out.weight is rotated by POET in"),
}  # fmt: skip


@pytest.mark.parametrize("what", [*(pytest.param(w, marks=pytest.mark.slow) for w in WRONG)])
def test_other_settings_are_refused(what: str, tmp_path: Path) -> None:
    settings, wanted = WRONG[what]
    saved(str(tmp_path), "POET")
    for said, untouched in harness.run(2, attempt, str(tmp_path), "POET", **settings):
        assert said.startswith("ValueError")
        assert wanted in said
        assert untouched


@pytest.mark.slow
def test_plain_and_rotated_are_not_mixed(tmp_path: Path) -> None:
    for kind, other, wanted in (
        ("POET", "Muon", "is rotated by POET in"),
        ("Muon", "POET", "is rotated by POET here, and not in"),
    ):
        folder = str(tmp_path / kind)
        saved(folder, kind)
        for said, untouched in harness.run(2, attempt, folder, other):
            assert said.startswith("ValueError")
            assert wanted in said
            assert untouched
