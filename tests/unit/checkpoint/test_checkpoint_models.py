"""A checkpoint of another rule, or of another model, is refused before anything has changed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spectral_dist
from spectral_dist import checkpoint, poet
from spectral_dist.checkpoint import dcp
from spectral_dist.checkpoint import files as checkpoint_files
from spectral_dist.rules import registry
from tests.unit.checkpoint.loading import (
    everything,
    refused,
    unchanged,
    without_manifest,
)

TITLES = [entry.title for entry in registry.builtin_entries()]


class Net(nn.Module):
    """An embedding, ``layers`` linear layers and a head, which may be the embedding."""

    def __init__(self, layers: int, width: int = 6, tied: bool = False, **more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(layers)
        self.embed = nn.Embedding(8, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def trained(model: nn.Module, kind: str = "Muon", **options: Any) -> tuple[nn.Module, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = getattr(spectral_dist, kind)(spectral_dist.param_groups(model), **options)
        cross_entropy(model(torch.arange(8)), torch.arange(8)).backward()
        optimizer.step()
    return model, optimizer


def saved(folder: Path, *args: Any, **kwargs: Any) -> None:
    checkpoint.save(folder, *trained(*args, **kwargs))


# -- rules


@pytest.mark.parametrize("theirs", TITLES)
def test_a_rule_takes_its_own_checkpoints_alone(theirs: str, tmp_path: Path) -> None:
    saved(tmp_path, Net(1), theirs)
    for ours in TITLES:
        model, optimizer = trained(Net(1), ours)
        if ours == theirs:
            checkpoint.load(tmp_path, model, optimizer)
            unchanged(everything(*trained(Net(1), theirs)), model, optimizer)
            continue
        message = refused(tmp_path, model, optimizer)
        assert f"saved with another optimizer: {theirs}, and this one is {ours}" in message
        assert str(tmp_path) in message


def test_a_class_derived_from_an_optimizer_is_of_its_rule(tmp_path: Path) -> None:
    class Mine(spectral_dist.Muon):
        pass

    saved(tmp_path, Net(1))
    model = Net(1)
    checkpoint.load(tmp_path, model, Mine(spectral_dist.param_groups(model)))


def test_poet_and_a_rule_that_has_no_layers(tmp_path: Path) -> None:
    """The layers are told before the rule, as that says what to do."""
    model = poet.convert(Net(1), block=2)
    saved(tmp_path, model, "POET")
    assert "is rotated by POET in" in refused(tmp_path, *trained(Net(1)))


def test_load_state_dict_knows_the_rule_as_well() -> None:
    content = checkpoint.state_dict(trained(Net(1), "PolarGrad")[1])
    with pytest.raises(ValueError, match="PolarGrad, and this one is Muon"):
        checkpoint.load_state_dict(trained(Net(1))[1], content)


def test_a_checkpoint_that_does_not_say_its_rule_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older releases have written them."""
    original = dcp._state_dict

    def old(*args: Any) -> dict[str, Any]:
        content = original(*args)
        groups = json.loads(content["groups"])
        assert all(group.pop("rule") == "Muon" for group in groups)
        return {**content, "groups": json.dumps(groups)}

    with monkeypatch.context() as patched:
        patched.setattr(dcp, "_state_dict", old)
        saved(tmp_path, Net(1))
    without_manifest(tmp_path)
    model, optimizer = trained(Net(1))
    checkpoint.load(tmp_path, model, optimizer)
    assert optimizer.param_groups[0]["rule"] == "Muon"


# -- parameters


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (3, 5), (1, 0), (0, 1)])
@pytest.mark.parametrize("kind", ["Muon", "SUMO"])
def test_more_and_fewer_layers(kind: str, theirs: int, ours: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 2} if kind == "SUMO" else {}

    def net(layers: int) -> Net:
        return Net(layers, first=nn.Linear(6, 6))  # none without a matrix

    saved(tmp_path, net(theirs), kind, **options)
    message = refused(tmp_path, *trained(net(ours), kind, **options))
    assert f"layers.{min(theirs, ours)}" in message
    assert "another model" in message


@pytest.mark.parametrize("theirs", [False, True])
def test_tied_and_untied(theirs: bool, tmp_path: Path) -> None:
    saved(tmp_path, Net(1, tied=theirs))
    message = refused(tmp_path, *trained(Net(1, tied=not theirs)))
    assert "head.weight" in message
    saved(tmp_path / "same", Net(1, tied=not theirs))
    checkpoint.load(tmp_path / "same", *trained(Net(1, tied=not theirs)))


def test_another_width_of_what_is_no_matrix(tmp_path: Path) -> None:
    saved(tmp_path, Net(1, norm=nn.LayerNorm(4)))
    message = refused(tmp_path, *trained(Net(1, norm=nn.LayerNorm(5))))
    assert "norm.weight is (5,) here, but (4,)" in message


@pytest.mark.parametrize("here", [False, True])
def test_a_buffer_more_or_less(here: bool, tmp_path: Path) -> None:
    saved(tmp_path, Net(1, **({} if here else {"norm": nn.BatchNorm1d(4, affine=False)})))
    more = {"norm": nn.BatchNorm1d(4, affine=False)} if here else {}
    message = refused(tmp_path, *trained(Net(1, **more)))
    assert "norm.running_mean" in message or "norm.num_batches_tracked" in message


def test_a_frozen_parameter_more(tmp_path: Path) -> None:
    frozen = nn.Linear(6, 6).requires_grad_(False)
    saved(tmp_path, Net(1, frozen=frozen))
    assert "frozen.weight" in refused(tmp_path, *trained(Net(1)))


def test_what_is_frozen_by_now_needs_no_state(tmp_path: Path) -> None:
    saved(tmp_path, Net(2))
    model = Net(2)
    model.layers[0].requires_grad_(False)
    model, optimizer = trained(model)
    checkpoint.load(tmp_path, model, optimizer)
    assert torch.equal(model.layers[0].weight, trained(Net(2))[0].layers[0].weight)


def test_what_the_optimizer_leaves_out_is_told(tmp_path: Path) -> None:
    """It would go on with old weights and without a word."""
    saved(tmp_path, Net(2))
    model = Net(2)
    groups = spectral_dist.param_groups(model)
    spectral_dist.tag(model)
    optimizer = spectral_dist.Muon(
        [p for p in groups[0]["params"] if p is not model.layers[0].weight]
    )
    cross_entropy(model(torch.arange(8)), torch.arange(8)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="does not train"):
        checkpoint.load(tmp_path, model, optimizer)


def test_groups_that_were_divided_otherwise_change_nothing(tmp_path: Path) -> None:
    model = Net(2)
    spectral_dist.tag(model)
    matrices = [layer.weight for layer in model.layers]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    halves = [{"params": [p], "lr": lr} for p, lr in zip(matrices, (0.1, 0.2), strict=True)]
    optimizer = spectral_dist.Muon([*halves, {"params": rest}])
    cross_entropy(model(torch.arange(8)), torch.arange(8)).backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer)
    assert "in two with different options" in refused(tmp_path, *trained(Net(2)))


def test_a_parameter_of_another_kind_changes_nothing(tmp_path: Path) -> None:
    model = Net(2)
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model, scalars=["layers.0.weight"]))
    checkpoint.save(tmp_path, model, optimizer)
    assert "of kind 'scalar' in the checkpoint" in refused(tmp_path, *trained(Net(2)))


# -- matrix state by itself


def test_matrix_state_of_another_save(tmp_path: Path) -> None:
    _, optimizer = trained(Net(2), "SUMO", rank=2)
    first = checkpoint.save_matrix_state(tmp_path / "a", optimizer)
    second = checkpoint.save_matrix_state(tmp_path / "b", optimizer)
    assert first != second
    before = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.matrix_state().items()}
    with pytest.raises(ValueError, match="of another save"):
        checkpoint.load_matrix_state(tmp_path / "a", optimizer, second)
    for folder, name in ((tmp_path / "a", first), (tmp_path / "b", second)):
        checkpoint.load_matrix_state(folder, optimizer, name)
    for matrix, state in optimizer.matrix_state().items():
        assert all(torch.equal(value, before[matrix][name]) for name, value in state.items())
    other = trained(Net(1), "SUMO", rank=2)[1]
    with pytest.raises(ValueError, match=r"layers\.1\.weight, which is not here"):
        checkpoint.load_matrix_state(tmp_path / "a", other)
    (tmp_path / "a" / checkpoint_files.MANIFEST).unlink()
    with pytest.raises(ValueError, match="is not complete"):
        checkpoint.load_matrix_state(tmp_path / "a", optimizer, first)
