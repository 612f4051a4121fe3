"""Parameters that are unfrozen later, as Lightning's BaseFinetuning does, are taken as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from tests.support import harness
from tests.support.weights import give_gradients, same, values
from tests.unit.core.trained import train


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))


def freeze(model: nn.Module, *layers: int) -> None:
    for layer in layers:
        model[layer].requires_grad_(False)


def unfreeze(model: nn.Module, optimizer: Any, *layers: int, **options: Any) -> None:
    """As BaseFinetuning.unfreeze_and_add_param_group."""
    for layer in layers:
        model[layer].requires_grad_(True)
    parameters = [p for layer in layers for p in model[layer].parameters() if p.requires_grad]
    optimizer.add_param_group({"params": parameters, **options})


def tagged_before(model: nn.Module) -> Any:
    spectral_dist.tag(model)
    freeze(model, 0, 1, 2)
    return spectral_dist.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)


def tagged_frozen(model: nn.Module) -> Any:
    freeze(model, 0, 1, 2)
    spectral_dist.tag(model)
    return spectral_dist.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)


def by_groups(model: nn.Module) -> Any:
    freeze(model, 0, 1, 2)
    return spectral_dist.Muon(spectral_dist.param_groups(model), lr=0.02)


@pytest.mark.parametrize("make", [tagged_before, tagged_frozen, by_groups])
def test_no_second_tag_is_needed(make: Callable[[nn.Module], Any]) -> None:
    """The same as with all of it from the start, but for the steps before."""
    model = build()
    optimizer = make(model)
    before = values(model)
    train(model, optimizer, 0, 2)
    assert all(torch.equal(values(model)[k], before[k]) for k in before if not k.startswith("3"))
    unfreeze(model, optimizer, 1, 2, lr=0.002)
    unfreeze(model, optimizer, 0)
    kinds = {r.name: g["kind"] for g in optimizer.param_groups for r in optimizer.routes[g["id"]]}
    assert kinds == {
        "0.weight": "scalar", "1.weight": "matrix", "1.bias": "scalar", "2.weight": "scalar",
        "2.bias": "scalar", "3.weight": "matrix", "3.bias": "scalar",
    }  # fmt: skip
    after = values(model)
    train(model, optimizer, 2, 4)
    for layer, lr in ((0, 0.02), (1, 0.002), (2, 0.002)):
        whole = build()
        whole.load_state_dict(after)
        other = spectral_dist.Muon(spectral_dist.param_groups(whole), lr=lr)
        train(whole, other, 2, 4)
        for name, p in model[layer].named_parameters():
            torch.testing.assert_close(p, whole[layer].get_parameter(name), rtol=1e-6, atol=1e-7)


def on_ranks() -> dict[str, torch.Tensor]:
    model = build()
    freeze(model, 0, 1, 2)
    ddp = DistributedDataParallel(model)
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(ddp), lr=0.02)
    train(model, optimizer, 0, 2)
    unfreeze(model, optimizer, 0, 1, 2)
    train(model, optimizer, 2, 4)
    units = [unit for unit in optimizer.all_units if unit.located.layouts]
    assert all(unit.located.replicas is not None for unit in units)
    return values(model)


def test_under_distributed_data_parallel() -> None:
    """The group of replicas is that of the others."""
    model = build()
    optimizer = by_groups(model)
    train(model, optimizer, 0, 2)
    unfreeze(model, optimizer, 0, 1, 2)
    train(model, optimizer, 2, 4)
    for found in harness.run(2, on_ranks):
        assert same(found, values(model))


def test_what_cannot_work_is_said_as_it_is() -> None:
    model = build()
    optimizer = by_groups(model)
    with pytest.raises(ValueError, match=r"1\.weight is frozen .*once it is unfrozen"):
        optimizer.add_param_group({"params": [model[1].weight]})
    with pytest.raises(ValueError, match="bare parameters"):
        optimizer.add_param_group({"params": [nn.Linear(2, 2).weight]})
    again = build()
    freeze(again, 1)
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(again, split={"1.weight": 3}))
    again[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight cannot be trained: split of 1\.weight"):
        optimizer.add_param_group({"params": [again[1].weight]})
    optimizer.add_param_group({"params": [again[1].bias]})


def test_patterns_hold_for_what_is_frozen() -> None:
    model = build()
    freeze(model, 0, 1)
    routing = {"one_sided": ["0.weight"], "split": {"1.weight": 2}, "scalars": ["3.weight"]}
    spectral_dist.tag(model, **routing)
    with pytest.raises(ValueError, match="no parameter is a matrix"):
        spectral_dist.param_groups(model, **routing)
    optimizer = spectral_dist.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)
    unfreeze(model, optimizer, 0, 1)
    names = [m.name for route in optimizer.all_routes for m in route.matrices]
    assert names == ["1.weight/0", "1.weight/1", "0.weight"]
    exact = [g["polar"] for g in optimizer.param_groups if g["kind"] == "matrix"]
    assert exact == ["jordan", "eigh"]
    give_gradients(model, 0)
    optimizer.step()


def test_poets_weights_stay_frozen() -> None:
    model = build()
    spectral_dist.poet.convert(model, block=2)
    spectral_dist.tag(model)
    optimizer = spectral_dist.POET([p for p in model.parameters() if p.requires_grad])
    model[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight cannot be trained: poet\.convert has frozen"):
        optimizer.add_param_group({"params": [model[1].weight]})
    frozen = build()
    spectral_dist.poet.convert(frozen, block=2)
    frozen[1].skew_in.requires_grad_(False)
    optimizer = spectral_dist.POET(spectral_dist.param_groups(frozen), merge_every=2)
    train(frozen, optimizer, 0, 1)
    frozen[1].skew_in.requires_grad_(True)
    optimizer.add_param_group({"params": [frozen[1].skew_in]})
    train(frozen, optimizer, 1, 4)
