"""Averages of POET's parameters over a merge are refused; those of exported weights are right."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spectral_dist
from tests.support.weights import same, values

X, Y = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(5)).unbind()


def plain() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def build(merge_every: int) -> tuple[nn.Module, Any]:
    model = spectral_dist.poet.convert(plain(), block=4)
    groups = spectral_dist.param_groups(model)
    return model, spectral_dist.POET(groups, lr=2e-2, merge_every=merge_every)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def test_an_average_over_a_merge_is_refused() -> None:
    """Said when it begins to be wrong, and whenever it is used: in a pass, exported, copied."""
    model, optimizer = build(3)
    average = averaged(model)
    for step in range(4):
        if step == 2:
            with pytest.warns(UserWarning, match="something averages the parameters"):
                train(model, optimizer, 1)
        else:
            train(model, optimizer, 1)
        if step < 3:
            average(X)  # right still
        average.update_parameters(model)
    says = r"0: this copy has been written from a layer that has merged since"
    with pytest.raises(ValueError, match=says):
        average(X)
    mixed = average.module
    for used in (mixed, copy.deepcopy(mixed), pickle.loads(pickle.dumps(mixed))):
        with pytest.raises(ValueError, match=says):
            used(X)
        with pytest.raises(ValueError, match=says):
            spectral_dist.poet.export(used)
    model(X)
    train(model, optimizer, 4)  # one warning is enough
    average.module.load_state_dict(model.state_dict())
    assert torch.equal(average(X), model(X))
    average.update_parameters(model)
    average(X)


def test_between_merges_it_is_as_good_as_any() -> None:
    model, optimizer = build(100)
    average = averaged(model)
    for _ in range(4):
        train(model, optimizer, 1)
        average.update_parameters(model)
    average(X)


def test_copies_that_nobody_averages_go_on() -> None:
    """A snapshot, one that is loaded, and one that trains by itself."""
    model, optimizer = build(2)
    train(model, optimizer, 1)
    snapshot, loaded = copy.deepcopy(model), copy.deepcopy(model)
    trained, second = copy.deepcopy((model, optimizer))
    before = snapshot(X)
    loaded.load_state_dict(model.state_dict())
    train(model, optimizer, 5)
    assert torch.equal(snapshot(X), before)
    train(trained, second, 5)
    assert torch.equal(trained(X), model(X))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(X), model(X))
    train(model, optimizer, 2)
    train(trained, second, 2)
    assert torch.equal(trained(X), model(X))
    again = pickle.loads(pickle.dumps(snapshot))
    assert torch.equal(again(X), before)
    with torch.inference_mode():
        copy.deepcopy(model)(X)


def test_the_average_of_exported_weights() -> None:
    """Against the same average by hand of the weights that the layers are."""
    model, optimizer = build(3)
    one = plain()
    average: AveragedModel | None = None
    wanted: dict[str, Tensor] = {}
    for _ in range(8):
        train(model, optimizer, 1)
        found = {k: v.clone() for k, v in spectral_dist.poet.export(model).items()}
        wanted = {k: 0.5 * wanted.get(k, v) + 0.5 * v for k, v in found.items()}
        one.load_state_dict(spectral_dist.poet.export(model))
        average = average or averaged(one)
        average.update_parameters(one)
    assert average is not None
    for name, value in values(average.module).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one(X), model(X), rtol=1e-4, atol=1e-5)


def test_models_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is exported is read as it was trained; what is saved as it is resumes, and is not."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    spectral_dist.poet.convert(model, block=8)
    said = "save_pretrained(folder, state_dict=spectral_dist.poet.export(model))"
    assert caplog.text.count(said) == 1
    optimizer = spectral_dist.POET(spectral_dist.param_groups(model), lr=1e-2)
    tokens = torch.arange(24).view(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    wanted = model(input_ids=tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", state_dict=spectral_dist.poet.export(model))
        model.save_pretrained(tmp_path / "resumed")
        read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
        frozen = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "resumed")
    torch.testing.assert_close(read(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    difference = (frozen(input_ids=tokens).logits - wanted).abs().max()
    assert difference > 1e-3  # which is what is said above
    spectral_dist.poet.convert(plain(), block=4)
    assert caplog.text.count(said) == 1


def test_weights_are_the_same_with_and_without_copies() -> None:
    first, optimizer = build(2)
    train(first, optimizer, 5)
    second, other = build(2)
    kept = copy.deepcopy(second)
    train(second, other, 5)
    assert same(values(first), values(second))
    assert not same(values(kept), values(second))
