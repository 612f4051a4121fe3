"""What wraps a model, and what other model is in the optimizer, changes no name in a checkpoint."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import spectral_dist
from spectral_dist import checkpoint
from spectral_dist.checkpoint import dcp
from spectral_dist.checkpoint import files as checkpoint_files
from spectral_dist.checkpoint.names import Names
from tests.support import harness
from tests.support.together import quiet
from tests.unit.checkpoint.loading import refused

OPTIONS: dict[str, dict[str, Any]] = {"Muon": {}, "SUMO": {"rank": 2}}


class ParametrizedNet(nn.Module):
    """Two blocks and a head; the weight of the second block is parametrized."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)) for _ in "ab")
        weight_norm(self.layers[1][0])
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def activation(model: ParametrizedNet) -> nn.Module:
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
    return model


def blocks_compiled(model: ParametrizedNet) -> nn.Module:
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")
    return model


def sharded(model: ParametrizedNet) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


ALONE: dict[str, Callable[[ParametrizedNet], nn.Module]] = {
    "plain": lambda model: model,
    "activation": activation,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "blocks compiled": blocks_compiled,
    "compiled activation": lambda model: torch.compile(activation(model), backend="eager"),
}
TOGETHER: dict[str, Callable[[ParametrizedNet], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp activation": lambda model: DistributedDataParallel(activation(model)),
    "compiled ddp": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "ddp compiled": lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
    "fsdp": sharded,
    "fsdp activation": lambda model: sharded(activation(model)),
    "fsdp blocks compiled": lambda model: sharded(blocks_compiled(model)),
}


def trained(wrap: Any, kind: str, steps: int, seed: int = 0) -> tuple[nn.Module, Any]:
    with quiet():
        model = wrap(ParametrizedNet(seed))
        groups = spectral_dist.param_groups(model)
        optimizer = getattr(spectral_dist, kind)(groups, **OPTIONS[kind])
        for step in range(steps):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("wrap", sorted(ALONE))
def test_wrappers_change_no_name_that_patterns_and_seeds_see(wrap: str) -> None:
    """SUMO draws its bases by names."""
    pattern = r"^layers\.\d+\.1\.weight$"
    with quiet():
        groups = spectral_dist.param_groups(ALONE[wrap](ParametrizedNet(0)), matrices=[pattern])
    names = {route.name for group in groups for route in group["routes"]}
    assert names == {name for name, _ in ParametrizedNet(0).named_parameters()}
    plain, _ = trained(ALONE["plain"], "SUMO", 3)
    wrapped, _ = trained(ALONE[wrap], "SUMO", 3)
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p, q)


def contents(folder: Path) -> dict[str, Any]:
    """All of a checkpoint, whole, by key."""
    content: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else 0
        for key, entry in checkpoint_files.read_metadata(folder).state_dict_metadata.items()
    }
    checkpoint_files.read(folder, content, flat=False)
    return content


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[key]), key
        elif key != "optimizer.groups":
            assert value == b[key], key


def through(folder: str, wrappers: dict[str, Any], kind: str, source: str) -> None:
    """Load ``source`` in every wrapper and save it again."""
    for name, wrap in wrappers.items():
        model, optimizer = trained(wrap, kind, 1, seed=1)
        with quiet():
            checkpoint.load(source, model, optimizer)
            checkpoint.save(Path(folder, name), model, optimizer, step=2)


def saved_together(folder: str, kind: str, name: str, source: str) -> None:
    model, optimizer = trained(TOGETHER[name], kind, 2)
    with quiet():
        checkpoint.save(source, model, optimizer, step=2)
    dist.barrier()
    through(folder, TOGETHER, kind, source)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] * (name not in ("plain", "activation")))
        for kind in OPTIONS
        for name in ALONE
    ],
)
def test_in_one_process(kind: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with quiet():
        checkpoint.save(source, *trained(ALONE[name], kind, 2), step=2)
    wanted = contents(source)
    through(str(tmp_path), ALONE, kind, str(source))
    for other in ALONE:
        same(contents(tmp_path / other), wanted)
    names = {key.removeprefix("model.") for key in wanted if key.startswith("model.")}
    assert names == set(ParametrizedNet(0).state_dict())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] * ((kind, name) not in FAST))
        for FAST in [(("Muon", "ddp activation"), ("SUMO", "fsdp"))]
        for kind in OPTIONS
        for name in TOGETHER
    ],
)
@pytest.mark.fast_cases("Muon-ddp activation")
def test_on_two_ranks_and_in_one_process(kind: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    harness.run(2, saved_together, str(tmp_path), kind, name, str(source))
    wanted = contents(source)
    through(str(tmp_path), ALONE, kind, str(source))
    for other in [*TOGETHER, *ALONE]:
        same(contents(tmp_path / other), wanted)


@pytest.mark.parametrize("name", ["plain", "activation", "compiled activation"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_names_that_an_older_release_has_written(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what activation checkpointing adds to them."""
    prefix = "_checkpoint_wrapped_module."

    def old(optimizer: Any, *given: Any) -> Names:
        def wrapped(name: str) -> str:
            return name.replace("layers.0.", f"layers.0.{prefix}")

        routes = optimizer.all_routes
        matrices = [matrix for route in routes for matrix in route.matrices]
        return Names({r.name: wrapped(r.name) for r in routes},
                     {m.name: wrapped(m.name) for m in matrices})  # fmt: skip

    with quiet():
        model, optimizer = trained(ALONE["plain"], kind, 2)
        checkpoint.save(tmp_path / "new", model, optimizer, step=2)
        with monkeypatch.context() as patched:
            patched.setattr(dcp, "names_of", old)
            checkpoint.save(tmp_path / "old", model, optimizer, step=2)
        assert any(prefix in key for key in contents(tmp_path / "old"))
        model, optimizer = trained(ALONE[name], kind, 1, seed=1)
        checkpoint.load(tmp_path / "old", model, optimizer)
        checkpoint.save(tmp_path / "again", model, optimizer, step=2)
    same(contents(tmp_path / "again"), contents(tmp_path / "new"))


def test_a_parametrized_model_is_not_the_plain_one(tmp_path: Path) -> None:
    """Its weight is another number than what is saved of it."""
    model = nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Linear(8, 6))
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model))
    checkpoint.save(tmp_path, model, optimizer)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    other = spectral_dist.Muon(spectral_dist.param_groups(plain))
    with pytest.raises(ValueError, match=r"has no .* of 0\.weight; it was saved of another model"):
        checkpoint.load(tmp_path, plain, other)


# -- several models in one optimizer


def two(kind: str, seed: int, *, swapped: bool = False, shared: bool = False) -> Any:
    """Actor and critic, of the same shapes and names, and their optimizer."""
    torch.manual_seed(seed)
    actor, critic = nn.Linear(6, 5), nn.Linear(6, 5)
    models = [critic, actor] if swapped else [actor, critic]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if shared:  # in one group
            for model in models:
                spectral_dist.tag(model)
            groups: Any = [p for model in models for p in model.parameters()]
        else:
            groups = [group for model in models for group in spectral_dist.param_groups(model)]
        return actor, critic, getattr(spectral_dist, kind)(groups, **OPTIONS[kind])


def steps(actor: nn.Module, critic: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(7, 6, generator=generator) for _ in "ab")
        (actor(x).square().sum() + 3 * critic(y).pow(2).sum()).backward()
        optimizer.step()


def weights(actor: nn.Module, critic: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for model in (actor, critic) for p in model.parameters()]


def pair(actor: nn.Module, critic: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"actor": actor, "critic": critic})


@pytest.mark.parametrize("shared", [False, True], ids=["groups of each", "one group"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_two_models_keep_both_states(kind: str, shared: bool, tmp_path: Path) -> None:
    never = two(kind, 0, shared=shared)
    steps(*never, 0, 5)
    first = two(kind, 0, shared=shared)
    steps(*first, 0, 3)
    state = checkpoint.state_dict(first[2])
    assert sorted(state["state"]) == ["bias", "bias#2", "weight", "weight#2"]
    checkpoint.save(tmp_path, pair(*first[:2]), first[2])
    content = contents(tmp_path)
    assert {f"optimizer.state.{m}.weight.step" for m in ("actor", "critic")} <= content.keys()
    second = two(kind, 1, shared=shared)
    checkpoint.load(tmp_path, pair(*second[:2]), second[2])
    steps(*second, 3, 5)
    for value, wanted in zip(weights(*second[:2]), weights(*never[:2]), strict=True):
        assert torch.equal(value, wanted)


def test_in_another_order(tmp_path: Path) -> None:
    """State follows the model's names, not the order of groups."""
    never, first, second = (two("Muon", seed) for seed in (0, 0, 1))
    steps(*never, 0, 5)
    steps(*first, 0, 3)
    checkpoint.save(tmp_path, pair(*first[:2]), first[2])
    second = two("Muon", 1, swapped=True)
    checkpoint.load(tmp_path, pair(*second[:2]), second[2])
    steps(*second, 3, 5)
    for value, wanted in zip(weights(*second[:2]), weights(*never[:2]), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIONS)
def test_state_dict_of_two_models(kind: str) -> None:
    never, first, second = (two(kind, seed) for seed in (0, 0, 1))
    steps(*never, 0, 5)
    steps(*first, 0, 3)
    saved = copy.deepcopy((pair(*first[:2]).state_dict(), first[2].state_dict()))
    pair(*second[:2]).load_state_dict(saved[0])
    second[2].load_state_dict(saved[1])
    steps(*second, 3, 5)
    for value, wanted in zip(weights(*second[:2]), weights(*never[:2]), strict=True):
        assert torch.equal(value, wanted)


def test_a_checkpoint_that_has_lost_one_models_state(tmp_path: Path) -> None:
    """As older releases have saved two models: one state by the one name."""
    actor, critic, optimizer = two("Muon", 0)
    alone = spectral_dist.Muon(spectral_dist.param_groups(actor))
    content = dcp._content(pair(actor, critic), optimizer, {})
    content["optimizer"] = checkpoint.state_dict(alone)
    checkpoint_files.write(tmp_path, content)
    assert "critic.weight" in refused_pair(tmp_path, two("Muon", 1))


def refused_pair(folder: Path, made: Any) -> str:
    actor, critic, optimizer = made
    steps(*made, 0, 1)
    return refused(folder, pair(actor, critic), optimizer)


def test_groups_of_a_part_of_what_is_saved(tmp_path: Path) -> None:
    """An older release has called parameters as in that part."""
    model = nn.ModuleDict({"part": nn.Linear(6, 5), "rest": nn.Linear(3, 3)})
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model["part"]))
    model["part"](torch.ones(2, 6)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "new", model, optimizer)
    assert "optimizer.state.part.weight.step" in contents(tmp_path / "new")
    content = dcp._content(model, optimizer, {})
    content["optimizer"] = checkpoint.state_dict(optimizer)
    checkpoint_files.write(tmp_path / "old", content)
    for folder in (tmp_path / "new", tmp_path / "old"):
        other = nn.ModuleDict({"part": nn.Linear(6, 5), "rest": nn.Linear(3, 3)})
        taken = spectral_dist.Muon(spectral_dist.param_groups(other["part"]))
        checkpoint.load(folder, other, taken)
        here, there = (
            o.state[m["part"].weight]["exp_avg"] for m, o in ((other, taken), (model, optimizer))
        )
        assert torch.equal(here, there)
        assert here.any()


def ddp_pair(folder: str) -> None:
    """Each in a DistributedDataParallel of its own."""
    with quiet():
        first, second = two("Muon", 0), two("Muon", 1)
        wrapped = []
        for made in (first, second):
            models = [DistributedDataParallel(model) for model in made[:2]]
            groups = [group for model in models for group in spectral_dist.param_groups(model)]
            wrapped.append((*models, spectral_dist.Muon(groups)))
        steps(*wrapped[0], 0, 3)
        checkpoint.save(folder, pair(*wrapped[0][:2]), wrapped[0][2])
        checkpoint.load(folder, pair(*wrapped[1][:2]), wrapped[1][2])
        for value, wanted in zip(weights(*wrapped[1][:2]), weights(*wrapped[0][:2]), strict=True):
            assert torch.equal(value, wanted)
        for made in wrapped:
            steps(*made, 3, 5)
        for value, wanted in zip(weights(*wrapped[1][:2]), weights(*wrapped[0][:2]), strict=True):
            assert torch.equal(value, wanted)


def test_two_models_under_ddp_and_alone(tmp_path: Path) -> None:
    harness.run(2, ddp_pair, str(tmp_path))
    never, second = two("Muon", 0), two("Muon", 1)
    checkpoint.load(tmp_path, pair(*second[:2]), second[2])
    steps(*never, 0, 5)
    steps(*second, 3, 5)
    for value, wanted in zip(weights(*second[:2]), weights(*never[:2]), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)
