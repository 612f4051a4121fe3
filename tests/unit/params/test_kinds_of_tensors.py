"""Sparse gradients, channels_last weights and other default dtypes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients
from spectral_dist.rules import registry
from tests.support import harness
from tests.support.together import OptimizedModel, expect, expect_failure
from tests.support.weights import give_gradients, same, values
from tests.unit.core.trained import build, train

TITLES = [entry.title for entry in registry.entries()]
RULES = [entry.title for entry in registry.entries() if entry.rule is not None]


def states(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return {
        f"{name} {key}": value.clone()
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


# -- sparse gradients


def sparse(p: nn.Parameter) -> Tensor:
    rows, width = torch.tensor([[0, 2]]), p.shape[1]
    return torch.sparse_coo_tensor(rows, torch.ones(2, width), p.shape, check_invariants=True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("title", TITLES)
def test_a_sparse_gradient_is_refused(title: str, check_finite: bool, first: bool) -> None:
    """Even where the other gradients are bad as well, and after steps without one."""
    model, _ = build(title)
    groups = spectral_dist.param_groups(model)
    optimizer = getattr(spectral_dist, title)(groups, check_finite=check_finite)
    if not first:
        train(model, optimizer, 0, 1)
    weights, before = values(model), states(model, optimizer)
    give_gradients(model, 1)
    model[0].weight.grad = sparse(model[0].weight)
    with pytest.raises(ValueError, match=r"gradient of 0\.weight is sparse .*sparse=False"):
        optimizer.step()
    assert same(values(model), weights)
    for key, value in states(model, optimizer).items():
        assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
    give_gradients(model, 1)
    optimizer.step()


def test_of_a_layer_itself() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 6, sparse=True, mode="sum"), nn.Linear(6, 8))
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model))
    model(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 0\.weight is sparse"):
        optimizer.step()


def sparse_on_one_rank() -> None:
    trial = OptimizedModel("ddp")
    trial.step(0)
    trial.backward(1)
    if trial.rank == 1:
        p = trial.parameter("0.weight")
        p.grad = sparse(p)
    error = expect_failure(trial, "gradient of 0.weight is sparse", trial.optimizer.step)
    trial.step(1)
    raise error


def test_all_ranks_refuse_it() -> None:
    expect("is sparse", sparse_on_one_rank)


# -- channels_last


def images() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 12, 2),
    )  # fmt: skip


def optimizer_of(model: nn.Module, title: str, **options: Any) -> Any:
    groups = spectral_dist.param_groups(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(spectral_dist, title)(groups, lr=0.02, **options)


def last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("title", RULES)
def test_channels_last_changes_no_bit(title: str, tmp_path: Path) -> None:
    """With either order of gradients, over a checkpoint, and where the order changes in between."""
    plain, model = images(), last(images())
    wanted, optimizer = optimizer_of(plain, title), optimizer_of(model, title)
    assert not model[0].weight.is_contiguous()
    for step in range(6):
        if step == 3:
            spectral_dist.checkpoint.save(tmp_path, model, optimizer)
            model = last(images())
            optimizer = optimizer_of(model, title)
            spectral_dist.checkpoint.load(tmp_path, model, optimizer)
        if step == 4:
            model.to(memory_format=torch.contiguous_format)
        if step == 5:
            last(model)
        give_gradients(plain, step)
        give_gradients(model, step)
        if step % 2:
            for p in model.parameters():
                if p.grad.ndim == 4:
                    p.grad = p.grad.contiguous(memory_format=torch.channels_last)
        wanted.step()
        optimizer.step()
        assert same(values(model), values(plain))
    assert not model[0].weight.is_contiguous()


def test_in_three_dimensions() -> None:
    plain, model = (nn.Sequential(nn.Conv3d(3, 5, 2)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    model.to(memory_format=torch.channels_last_3d)
    for each in (plain, model):
        train(each, optimizer_of(each, "Muon"), 0, 2)
    assert same(values(model), values(plain))


def replicas(folder: str, replicate: bool) -> None:
    """Momentum at owners, or everywhere; and what is saved of it."""
    found = []
    for change in (lambda model: model, last):
        model = DistributedDataParallel(change(images()))
        optimizer = optimizer_of(model, "Muon", replicate_momentum=replicate)
        train(model, optimizer, 0, 2)
        where = f"{folder}/{len(found)}"
        spectral_dist.checkpoint.save(where, model, optimizer)
        again = DistributedDataParallel(last(images()))
        optimizer = optimizer_of(again, "Muon", replicate_momentum=replicate)
        spectral_dist.checkpoint.load(where, again, optimizer)
        train(model := again, optimizer, 2, 4)
        found.append(values(model.module))
    plain = images()
    train(plain, optimizer_of(plain, "Muon"), 0, 4)
    assert same(found[0], found[1])
    for name, value in values(plain).items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("replicate", [False, True])
def test_on_two_ranks(replicate: bool, tmp_path: Path) -> None:
    harness.run(2, replicas, str(tmp_path), replicate)


def projected() -> str:
    model = DistributedDataParallel(last(images()))
    optimizer = optimizer_of(model, "SUMO", rank=2, perp_scale=0)
    with pytest.raises(ValueError, match=r"0\.weight is channels_last") as raised:
        project_gradients(model, optimizer)
    return str(raised.value)


def test_projected_gradients_are_refused() -> None:
    assert len(harness.run(2, projected)) == 2


# -- torch.set_default_dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("title", TITLES)
def test_the_default_dtype_changes_nothing(title: str, dtype: torch.dtype) -> None:
    """Around construction and steps; only what the model itself is made of follows it."""
    wanted, first = build(title)
    train(wanted, first, 0, 5)
    model, _ = build(title)
    torch.set_default_dtype(dtype)
    try:
        groups = spectral_dist.param_groups(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"SUMO": {"rank": 2, "period": 3}, "POET": {"merge_every": 3}}
            optimizer = getattr(spectral_dist, title)(groups, lr=0.02, **options.get(title, {}))
        for step in range(5):
            give_gradients(model, step)
            optimizer.step()
        made = states(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(values(model), values(wanted))
    kept = states(wanted, first)
    assert same(made, kept)
    assert {k: v.dtype for k, v in made.items()} == {k: v.dtype for k, v in kept.items()}
    parts = [getattr(o, "matrix_state", dict)() for o in (optimizer, first)]
    for name, quantities in parts[1].items():
        assert same(parts[0][name], quantities)
        assert all(parts[0][name][k].dtype == v.dtype for k, v in quantities.items())
