"""Schedulers of torch and transformers drive every optimizer, and its momentum where they do."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import spectral_dist
from spectral_dist.rules import registry
from tests.support.weights import give_gradients, same, values

STEPS = 12
TITLES = [entry.title for entry in registry.entries()]
RULES = [entry.title for entry in registry.entries() if entry.rule is not None]
NUMBERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "ReduceLROnPlateau": {"patience": 0},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.05, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.05, "total_steps": STEPS},
}
FUNCTIONS = {"LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
"""What takes functions or other schedulers."""
TRANSFORMERS = {
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))


def build(title: str, **options: Any) -> tuple[nn.Module, Any]:
    made = model()
    if title == "POET":
        spectral_dist.poet.convert(made, blocks={"^1$": (2, 2), "^3$": (2, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = spectral_dist.param_groups(made)
        return made, getattr(spectral_dist, title)(groups, **{"lr": 0.02, **options})


def drive(made: nn.Module, optimizer: Any, scheduler: Any) -> Iterator[int]:
    """Five steps, after each of which the scheduler has its turn."""
    for step in range(5):
        give_gradients(made, step)
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 + step)
        else:
            scheduler.step()
        yield step


def test_none_is_left_out() -> None:
    there = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, lr_scheduler.LRScheduler)
        and not name.startswith("_")
    }
    assert there <= NUMBERS.keys() | FUNCTIONS | {"SWALR"}


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize("name", NUMBERS)
def test_of_torch(title: str, name: str) -> None:
    """With their defaults; what they write is the lr, the same in every group."""
    made, optimizer = build(title)
    options = dict(NUMBERS[name])
    if name in ("CyclicLR", "OneCycleLR") and title == "POET":
        assert "betas" in optimizer.param_groups[0]
    scheduler = getattr(lr_scheduler, name)(optimizer, **options)
    seen = [[group["lr"] for group in optimizer.param_groups]]
    for _ in drive(made, optimizer, scheduler):
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert all(len(set(lrs)) == 1 for lrs in seen)
    assert len({lrs[0] for lrs in seen}) > 1
    assert all(p.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("title", TITLES)
def test_of_transformers(title: str) -> None:
    transformers = pytest.importorskip("transformers")
    names = {each.value for each in transformers.SchedulerType} - {"greedy"}
    assert names >= TRANSFORMERS
    for name in sorted(TRANSFORMERS):
        made, optimizer = build(title)
        scheduler = transformers.get_scheduler(
            name, optimizer, num_warmup_steps=1, num_training_steps=6,
            scheduler_specific_kwargs=MORE.get(name),
        )  # fmt: skip
        for _ in drive(made, optimizer, scheduler):
            lrs = {group["lr"] for group in optimizer.param_groups}
            assert len(lrs) == 1, name
        assert all(p.isfinite().all() for p in made.parameters()), name


def cycled(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS)


def run(title: str, how: str, first: int = 0, last: int = STEPS - 1, folder: str = "") -> Any:
    """Steps under OneCycleLR, or with what it writes written by hand ('momentum' or 'betas')."""
    made, optimizer = build(title)
    twin = build(title)[1] if how != "cycle" else optimizer
    scheduler = cycled(twin)
    if first:
        extra = spectral_dist.checkpoint.load(folder, made, optimizer)
        scheduler.load_state_dict(extra["scheduler"])
    seen = []
    for step in range(first, last):
        for group, wanted in zip(optimizer.param_groups, twin.param_groups, strict=True):
            if how != "cycle":
                group["lr"] = wanted["lr"]
                beta = wanted["betas"][0]
                if how == "momentum" and group["kind"] == "matrix":
                    group["momentum"] = beta
                elif how != "lr":
                    group["betas"] = (beta, group["betas"][1])
        give_gradients(made, step)
        optimizer.step()
        seen.append([group.get("momentum") for group in optimizer.param_groups])
        if how != "cycle":
            twin.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()
        else:
            scheduler.step()
    if folder and not first:
        spectral_dist.checkpoint.save(folder, made, optimizer, scheduler=scheduler.state_dict())
    return values(made), seen


@pytest.mark.parametrize("title", RULES)
def test_one_cycle_reaches_the_momentum(title: str) -> None:
    """As if ``group["momentum"]`` had been written before each step; and not as without."""
    weights, seen = run(title, "cycle")
    by_hand, _ = run(title, "momentum")
    assert same(weights, by_hand)
    if any(momentum is not None for momentum in seen[0]):
        momenta = [row[0] for row in seen]
        assert momenta[0] == pytest.approx(0.95)
        assert min(momenta) == pytest.approx(0.85, abs=0.01)
        assert not same(weights, run(title, "lr")[0])


@pytest.mark.parametrize("title", RULES)
@pytest.mark.parametrize("loaded", [False, True])
def test_momentum_that_is_written_is_that_of_the_rule(title: str, loaded: bool) -> None:
    """Before the first step, or after a load: as an optimizer that was built with it."""
    made, optimizer = build(title)
    if loaded:
        optimizer.load_state_dict(build(title)[1].state_dict())
    for group in optimizer.param_groups:
        if group["kind"] == "matrix":
            group["momentum"] = 0.5
    other, wanted = build(title, momentum=0.5)
    default, usual = build(title)
    for step in range(3):
        for each, stepping in ((made, optimizer), (other, wanted), (default, usual)):
            give_gradients(each, step)
            stepping.step()
    assert same(values(made), values(other))
    assert not same(values(made), values(default))


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("title", RULES)
def test_resumed_in_mid_cycle(title: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    whole, seen = run(title, "cycle")
    run(title, "cycle", 0, 5, folder)
    resumed, later = run(title, "cycle", 5, folder=folder)
    assert same(whole, resumed)
    assert later == seen[5:]


# -- each group's own learning rate, and one for all


APART = {"lr": 0.02, "scalar_lr": 3e-4}


def rates(optimizer: Any) -> list[float]:
    """In the order matrices (rotations), the rest."""
    by_kind = sorted(optimizer.param_groups, key=lambda group: group["kind"] == "scalar")
    return [float(group["lr"]) for group in by_kind]


@pytest.mark.parametrize("title", TITLES)
def test_what_a_group_shows_is_used(title: str) -> None:
    """The embedding moves by scalar_lr, and by what is written there, as by AdamW."""
    for written in (None, 1e-3):
        made, optimizer = build(title, **APART, weight_decay=0.0)
        assert rates(optimizer) == [0.02, 3e-4]
        if written:
            next(g for g in optimizer.param_groups if g["kind"] == "scalar")["lr"] = written
        before = made[0].weight.detach().clone()
        give_gradients(made, 0)
        optimizer.step()
        change = (made[0].weight.detach() - before).abs().max()
        assert float(change) == pytest.approx(written or 3e-4, rel=1e-3)  # AdamW's first step


EACH: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=[g["lr"] for g in o.param_groups], total_steps=STEPS, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("title", ["Muon", "POET"])
def test_schedulers_of_each_groups_own(title: str, name: str) -> None:
    """As of two optimizers of torch's."""
    made, optimizer = build(title, **APART)
    theirs = [torch.optim.SGD([torch.ones(1)], lr=lr) for lr in (0.02, 3e-4)]
    schedules = [EACH[name](each) for each in (optimizer, *theirs)]
    for _ in drive(made, optimizer, schedules[0]):
        for each, schedule in zip(theirs, schedules[1:], strict=True):
            each.step()
            schedule.step()
        assert rates(optimizer) == pytest.approx([each.param_groups[0]["lr"] for each in theirs])


@pytest.mark.parametrize("title", ["Muon", "POET"])
def test_one_number_for_all_groups_is_said_once(title: str) -> None:
    made, optimizer = build(title, **APART)
    for step, lr in enumerate((0.0, 0.01, 0.02)):  # a warmup from zero says nothing yet
        for group in optimizer.param_groups:
            group["lr"] = lr
        give_gradients(made, step)
        if step == 1:
            with pytest.warns(UserWarning, match=r"every parameter group is 0\.01 now.*scalar_lr"):
                optimizer.step()
        else:
            optimizer.step()
    made, optimizer = build(title, lr=0.02)
    cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS)
    for _ in drive(made, optimizer, cycle):
        pass  # they were never apart


@pytest.mark.parametrize("title", ["Muon", "POET"])
def test_groups_of_older_releases_keep_their_ratio(title: str, tmp_path: Path) -> None:
    """And the schedulers that were saved with them: one lr, which the ratio multiplies."""
    wanted, first = build(title, **APART)
    schedule = EACH["LambdaLR"](first)
    for _ in drive(wanted, first, schedule):
        pass
    saved = copy.deepcopy(first.state_dict())
    for group in saved["param_groups"]:
        ratio = 1.0 if group["kind"] != "scalar" else 3e-4 / 0.02
        group.update(lr=group["lr"] / ratio, lr_ratio=ratio, initial_lr=0.02)
        group.pop("rule")
    kept = {**schedule.state_dict(), "base_lrs": [0.02, 0.02]}
    made, optimizer = build(title, **APART)
    again = EACH["LambdaLR"](optimizer)
    made.load_state_dict(wanted.state_dict())
    optimizer.load_state_dict(saved)
    again.load_state_dict(kept)
    for a, x, s in ((wanted, first, schedule), (made, optimizer, again)):
        for step in range(5, 8):
            give_gradients(a, step)
            x.step()
            s.step()
    assert set(rates(optimizer)) == {rates(first)[0]}
    for name, value in values(wanted).items():
        torch.testing.assert_close(values(made)[name], value, rtol=1e-6, atol=1e-7)
