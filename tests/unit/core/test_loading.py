"""A state dict that is not this optimizer's is refused when it is loaded, and nothing changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import spectral_dist
from spectral_dist.rules import registry
from tests.support import together
from tests.support.together import OptimizedModel, expect
from tests.support.weights import same, values
from tests.unit.core.trained import build, train

TITLES = [entry.title for entry in registry.entries()]
RULES = [entry.title for entry in registry.entries() if entry.rule is not None]


def everything(model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Copies of weights, states, matrix state and groups."""
    tensors = values(model)
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        tensors |= {f"{names[p]} {key}": value.clone() for key, value in state.items()}
    for matrix, kept in getattr(optimizer, "matrix_state", dict)().items():
        tensors |= {f"{matrix} {key}": value.clone() for key, value in kept.items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, [*copy.deepcopy(groups), [[id(p) for p in g["params"]] for g in
                                              optimizer.param_groups]]  # fmt: skip


def expect_kept(
    model: nn.Module, optimizer: Any, load: Callable[[], Any], says: str, steps: int = 2
) -> None:
    """Loading fails, and the run goes on as if it had not been tried."""
    tensors, groups = everything(model, optimizer)
    with pytest.raises(ValueError, match=says):
        load()
    now, its_groups = everything(model, optimizer)
    assert its_groups == groups
    for key, value in now.items():
        assert torch.equal(value, tensors.get(key, torch.zeros_like(value))), key
    assert tensors.keys() <= now.keys()
    train(model, optimizer, steps, steps + 1)


def trained(title: str, steps: int = 2) -> tuple[nn.Module, Any]:
    model, optimizer = build(title)
    train(model, optimizer, 0, steps)
    return model, optimizer


def unmarked(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As an older release has saved it."""
    groups = [{k: v for k, v in g.items() if k != "rule"} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("title", TITLES)
def test_of_every_other_rule(title: str, steps: int) -> None:
    model, optimizer = trained(title, steps)
    for other in TITLES:
        if other == title:
            continue
        saved = trained(other)[1].state_dict()
        says = f"saved by {other}.*build spectral_dist.{other}, or start {title} without it"
        expect_kept(model, optimizer, lambda s=saved: optimizer.load_state_dict(s), says, steps)
        steps += 1


@pytest.mark.parametrize("title", TITLES)
def test_its_own(title: str) -> None:
    """That of a release before groups had a mark, too; and it is saved again."""
    model, optimizer = trained(title, 4)
    for change in (lambda s: s, unmarked):
        saved = change(copy.deepcopy(optimizer.state_dict()))
        other, second = build(title)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        second.load_state_dict(saved)
        assert [g["rule"] for g in second.state_dict()["param_groups"]] == [title, title]
        wanted, first = trained(title, 4)
        train(wanted, first, 4, 7)
        train(other, second, 4, 7)
        assert same(values(other), values(wanted))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("title", TITLES)
def test_of_adamw(title: str, number: int) -> None:
    """In as many groups as ours, in fewer and in more."""
    model, optimizer = trained(title)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    cut = len(optimizer.param_groups[0]["params"])
    parts = [params[:cut], params[cut:-1], params[-1:]][: number - 1]
    parts.append(params[sum(map(len, parts)) :])
    adamw = torch.optim.AdamW([{"params": part} for part in parts])
    adamw.step()
    says = "another optimizer than .*its groups have no 'kind'"
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(adamw.state_dict()), says)


def of_other_groups() -> dict[str, Any]:
    model, _ = build("Muon")
    groups = spectral_dist.param_groups(model)
    groups[1]["weight_decay"] = 0.0
    split = [{**groups[1], "params": groups[1]["params"][k:][:1],
              "routes": groups[1]["routes"][k:][:1]} for k in range(5)]  # fmt: skip
    return spectral_dist.Muon([groups[0], *split]).state_dict()


def of_other_kinds() -> dict[str, Any]:
    model, _ = build("Muon")
    groups = spectral_dist.param_groups(model, matrices=["0"], scalars=[r"3\.weight"])
    return spectral_dist.Muon(groups).state_dict()


def of_another_model() -> dict[str, Any]:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8))
    return spectral_dist.Muon(spectral_dist.param_groups(model)).state_dict()


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (of_other_groups, "groups are of .*'1 scalar'.* and this optimizer's of"),
        (of_another_model, r"groups are of \['1 matrix', '4 scalar'\] parameters"),
        (dict, "no optimizer's state dict"),
        (lambda: None, "no optimizer's state dict"),
        (lambda: {"state": {}, "param_groups": {}}, "no optimizer's state dict"),
        (lambda: {"state": {}, "param_groups": [1, 2]}, "groups have no 'kind'"),
        (lambda: {"param_groups": []}, "no optimizer's state dict"),
    ],
)
def test_other_groups(saved: Callable[[], Any], says: str) -> None:
    model, optimizer = trained("Muon")
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(saved()), says)


def test_a_parameter_of_another_kind() -> None:
    """As many matrices, but others: they differ in shape."""
    model, optimizer = trained("Muon")
    other, _ = build("Muon")
    groups = spectral_dist.param_groups(other, matrices=["0"], scalars=[r"3\.weight"])
    second = spectral_dist.Muon(groups)
    train(other, second, 0, 1)
    expect_kept(
        model, optimizer, lambda: optimizer.load_state_dict(second.state_dict()),
        r"1\.weight is \(8, 6\), and its exp_avg \(7, 6\)",
    )  # fmt: skip


BAD: dict[str, Any] = {
    "another shape": (torch.zeros(3, 3), r"and its exp_avg \(3, 3\)"),
    "flat": (torch.zeros(48), r"and its exp_avg \(48,\)"),
    "text": ("text", "is 'text', and no tensor"),
    "nothing": (None, "is None, and no tensor"),
    "a number": (0.5, r"is 0\.5, and no tensor"),
    "whole numbers": (torch.zeros(8, 6, dtype=torch.int64), "is torch.int64, and no tensor"),
    "NaN": (torch.full((8, 6), math.nan), "is NaN or infinite"),
    "infinity": (torch.full((8, 6), math.inf), "is NaN or infinite"),
    "one infinity": (torch.zeros(8, 6).index_fill(0, torch.tensor(3), -math.inf), "is NaN or inf"),
}


def first_of(saved: dict[str, Any], kind: str) -> int:
    """The number of the first parameter of a kind."""
    number: int = next(g for g in saved["param_groups"] if g["kind"] == kind)["params"][0]
    return number


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("title", ["Muon", "PolarGrad", "ROOT", "NorMuon"])
def test_bad_momentum(title: str, name: str) -> None:
    value, says = BAD[name]
    model, optimizer = trained(title)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = value
    says = rf"1\.weight.*{says}"
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(saved), says)


@pytest.mark.parametrize("name", [name for name in BAD if name != "flat"])
@pytest.mark.parametrize("title", TITLES)
def test_bad_moments_of_adamw(title: str, name: str) -> None:
    value, says = BAD[name]
    if isinstance(value, Tensor) and "shape" not in name:
        value = value[:7]  # the embedding's
    model, optimizer = trained(title)
    saved = copy.deepcopy(optimizer.state_dict())
    at = first_of(saved, "scalar")
    saved["state"][at]["exp_avg_sq"] = value
    says = says.replace("exp_avg ", "exp_avg_sq ")
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(saved), rf"0\.weight.*{says}")


@pytest.mark.parametrize("step", [math.nan, -1.0, "two", None, torch.ones(2), True])
def test_bad_counts_of_steps(step: Any) -> None:
    model, optimizer = trained("Muon")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(saved), "no number of steps")


@pytest.mark.parametrize("title", TITLES)
def test_moments_that_are_missing(title: str) -> None:
    model, optimizer = trained(title)
    saved = copy.deepcopy(optimizer.state_dict())
    at = first_of(saved, "scalar")
    del saved["state"][at]["exp_avg_sq"]
    says = r"0\.weight has taken 2 steps and has no exp_avg_sq"
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(saved), says)


MATRIX_STATE: dict[str, Any] = {
    "missing": (lambda kept: kept.popitem(), "this state dict lacks matrix state: it has no"),
    "another shape": (lambda kept: kept.update({next(iter(kept)): torch.zeros(3, 3)}), "here, but"),
    "text": (lambda kept: kept.update({next(iter(kept)): "text"}), "and no tensor"),
    "NaN": (lambda kept: [v.fill_(math.nan) for v in kept.values() if v.is_floating_point()],
            "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRIX_STATE)
@pytest.mark.parametrize("title", ["SUMO", "NorMuon"])
def test_bad_matrix_state(title: str, name: str) -> None:
    """Of the last matrix: none before it is taken, nor are weights' states."""
    change, says = MATRIX_STATE[name]
    model, optimizer = trained(title)
    saved = copy.deepcopy(trained(title, 3)[1].state_dict())
    state = saved["state"][saved["param_groups"][0]["params"][-1]]
    kept = {name: state.pop(name) for name in list(state) if name.startswith("matrix_")}
    change(kept)
    state.update(kept)
    expect_kept(model, optimizer, lambda: optimizer.load_state_dict(saved), says)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("title", TITLES)
def test_torchs_own_functions(title: str, flat: bool) -> None:
    """torch's functions keep moments, groups and matrix state."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(title, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, second = trained(title, 1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    set_optimizer_state_dict(other, second, saved, options=options)
    train(model, optimizer, 4, 7)
    train(other, second, 4, 7)
    assert same(values(other), values(model))
    for wrong in set(RULES) - {title, "SUMO", "NorMuon"} if not flat else ():
        third, loads = trained(wrong)
        if title == "POET":  # its parameters are others
            continue
        with pytest.raises(ValueError, match=f"saved by {title}"):
            set_optimizer_state_dict(third, loads, saved, options=options)


def loading(layout: str, kind: str, damage: str) -> None:
    """Rank 1 alone has a state dict that does not fit."""
    options = {"replicate_momentum": True} if layout == "ddp" else {}
    trial = OptimizedModel(layout, kind, **options)
    for number in range(2):
        trial.step(number)
    saved = copy.deepcopy(trial.optimizer.state_dict())
    wrong = copy.deepcopy(saved)
    if damage == "rule":
        wrong["param_groups"][1]["rule"] = "Other"
    else:
        wrong["state"][0]["exp_avg"].fill_(math.nan)
    given = wrong if trial.rank == 1 else saved
    error = together.expect_failure(
        trial, damage if damage == "NaN" else "saved by Other",
        lambda: trial.optimizer.load_state_dict(given),
    )  # fmt: skip
    trial.step(2)
    trial.optimizer.load_state_dict(saved)
    raise error


@pytest.mark.parametrize("damage", ["rule", "NaN"])
@pytest.mark.parametrize("layout", together.LAYOUTS)
def test_all_ranks_refuse_what_one_has(layout: str, damage: str) -> None:
    expect("on rank 1 of 2", loading, layout, "Muon", damage)
