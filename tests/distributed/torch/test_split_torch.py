"""Strategy ``split``: fewer matrices than ranks, and the numbers of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import spectral_dist
from spectral_dist.integrations.torch.reduce_to_owners import reduce_to_owners
from spectral_dist.sharding.collectives import size
from tests.support import harness
from tests.support.quiet import quiet

SHAPES = [(48, 64), (64, 48)]
RULES: dict[str, dict[str, Any]] = {
    "Muon": {},
    "NorMuon": {},
    "ROOT": {},
    "PolarGrad": {"polar": "polar_express"},
}
STEPS = 4


def build(kind: str) -> nn.ModuleDict:
    torch.manual_seed(3)
    layers: dict[str, nn.Module] = {
        f"layer{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(SHAPES)
    }
    model = nn.ModuleDict({**layers, "norm": nn.LayerNorm(8)})
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        for layer in layers.values():
            fully_shard(layer, mesh=mesh)
    elif kind == "fsdp":
        for layer in layers.values():
            fully_shard(layer)
    return model


def optimizer_of(model: nn.Module, kind: str, title: str, strategy: str = "split") -> Any:
    options = {**RULES[title], "lr": 0.02, "strategy": strategy}
    if kind == "ddp":
        options["process_group"] = dist.group.WORLD
    with quiet():
        return getattr(spectral_dist, title)(spectral_dist.param_groups(model), **options)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
            p.grad = gradient
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def run(kind: str, title: str) -> tuple[dict[str, Tensor], int, list[int], int]:
    """Weights, calls of polar, the sizes of teams, and the numbers of momentum on this rank."""
    model = build(kind)
    optimizer = optimizer_of(model, kind, title)
    train(model, optimizer, 0, STEPS)
    unit = optimizer.all_units[0]
    momentum = sum(
        (m.to_local() if isinstance(m, DTensor) else m).numel()
        for p in optimizer.param_groups[0]["params"]
        for m in [optimizer.state[p]["exp_avg"]]
    )
    assert unit.plan.imbalance == 1.0
    assert size(unit.located.group) * size(unit.located.replicas) == dist.get_world_size()
    return whole(model), optimizer.polar_calls, [b.team for b in unit.plan.buckets], momentum


@pytest.mark.parametrize("title", RULES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.fast_cases("ddp-Muon", "ddp-ROOT", "fsdp-NorMuon", "hsdp-PolarGrad")
def test_all_ranks_work_and_the_numbers_are_those_of_one_process(kind: str, title: str) -> None:
    model = build("")
    train(model, optimizer_of(model, "", title, "owner"), 0, STEPS)
    results = harness.run(4, run, kind, title)
    assert sum(calls for _, calls, _, _ in results) == STEPS * len(SHAPES)
    matrices = sum(m * n for m, n in SHAPES)
    for weights, _, teams, momentum in results:
        # of two replicas of two ranks each has one matrix, which both its ranks share
        assert teams == [2]
        assert momentum == matrices / (2 if kind == "hsdp" else 4)
        for name, wanted in whole(model).items():
            torch.testing.assert_close(weights[name], wanted, rtol=1e-6, atol=1e-6)


def resume(kind: str, title: str, folder: str) -> dict[str, Tensor]:
    """Go on from a checkpoint of another strategy, and write one of ``split``."""
    model = build(kind)
    optimizer = optimizer_of(model, kind, title, "owner")
    train(model, optimizer, 0, 2)
    spectral_dist.checkpoint.save(f"{folder}/owner", model, optimizer)
    model = build(kind)
    optimizer = optimizer_of(model, kind, title)
    spectral_dist.checkpoint.load(f"{folder}/owner", model, optimizer)
    train(model, optimizer, 2, 3)
    spectral_dist.checkpoint.save(f"{folder}/split", model, optimizer)
    if kind == "ddp":  # torch's own state dict, gathered from the team
        optimizer.consolidate_state_dict()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = optimizer_of(model, kind, title)
        optimizer.load_state_dict(saved)
    train(model, optimizer, 3, STEPS)
    return whole(model)


@pytest.mark.parametrize("title", ["Muon", "NorMuon"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.fast_cases("ddp-NorMuon", "fsdp-Muon")
def test_checkpoints_of_teams(kind: str, title: str, tmp_path: Path) -> None:
    model = build("")
    train(model, optimizer_of(model, "", title, "owner"), 0, STEPS)
    expected = whole(model)
    for weights in harness.run(4, resume, kind, title, str(tmp_path)):
        for name, wanted in expected.items():
            torch.testing.assert_close(weights[name], wanted, rtol=1e-6, atol=1e-6)
    model = build("")
    optimizer = optimizer_of(model, "", title, "owner")
    spectral_dist.checkpoint.load(tmp_path / "split", model, optimizer)
    train(model, optimizer, 3, STEPS)
    for name, wanted in whole(model).items():
        torch.testing.assert_close(wanted, expected[name], rtol=1e-6, atol=1e-6)


class Loss(nn.Module):
    """Every rank has other gradients; the last layer's matrices lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.first, self.second = (nn.Linear(n, m, bias=False) for m, n in SHAPES)
        self.beside = conv1d(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.beside(self.first(self.second(x).tanh()).tanh()).square().mean()
        return y


def reduced(strategy: str, owners: bool) -> dict[str, Tensor]:
    with quiet():
        model = nn.parallel.DistributedDataParallel(Loss())
        groups = spectral_dist.param_groups(model, split={r"beside\.weight": [1, 1]})
        optimizer = spectral_dist.Muon(groups, lr=0.02, strategy=strategy)
        if owners:
            reduce_to_owners(model, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            model(torch.randn(4, 48, generator=generator)).backward()
            optimizer.step()
        unit = optimizer.all_units[0]
        assert ("split" in unit.plan.strategies) == (strategy == "split")
        assert any(not piece.is_run for piece in unit.exchange.local_runs.pieces)
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("strategy", ["owner", "split"])
def test_gradients_go_to_those_that_read_them(strategy: str) -> None:
    """To the rank of a slab, and of matrices side by side to the owner of each."""
    plain = harness.run(4, reduced, strategy, False)[0]
    for weights in harness.run(4, reduced, strategy, True):
        for name, wanted in plain.items():
            torch.testing.assert_close(weights[name], wanted, rtol=1e-6, atol=1e-6)


def uneven(kind: str) -> dict[str, Tensor]:
    """One matrix on three ranks, of which two share it; slabs and rows that do not divide."""
    torch.manual_seed(4)
    model = nn.ModuleDict({"layer": nn.Linear(7, 5, bias=False), "norm": nn.LayerNorm(8)})
    if kind == "fsdp":
        fully_shard(model["layer"])
    optimizer = optimizer_of(model, kind, "Muon")
    train(model, optimizer, 0, STEPS)
    assert [bucket.team for bucket in optimizer.all_units[0].plan.buckets] == [2]
    return whole(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sides_that_do_not_divide(kind: str) -> None:
    torch.manual_seed(4)
    model = nn.ModuleDict({"layer": nn.Linear(7, 5, bias=False), "norm": nn.LayerNorm(8)})
    train(model, optimizer_of(model, "", "Muon", "owner"), 0, STEPS)
    for weights in harness.run(3, uneven, kind):
        for name, wanted in whole(model).items():
            torch.testing.assert_close(weights[name], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("title", "options", "text"),
    [
        ("Muon", {"polar": "qdwh"}, "polar is 'qdwh', which strategy 'split' does not share"),
        ("SUMO", {}, "SUMO works in small subspaces already"),
        ("ROOT", {"adapt_every": 3}, "no rank has a whole matrix"),
        ("PolarGrad", {}, "strategy 'split' does not share"),
    ],
)
def test_what_cannot_be_split_is_refused(title: str, options: dict[str, Any], text: str) -> None:
    groups = spectral_dist.param_groups(build(""))
    with pytest.raises(ValueError, match=text):
        getattr(spectral_dist, title)(groups, strategy="split", **options).step()


def test_alone_nothing_is_shared() -> None:
    model = build("")
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), strategy="split")
    with pytest.warns(UserWarning, match="strategy 'split' has no effect on layer0.weight"):
        train(model, optimizer, 0, 1)


def conv_saved(folder: str) -> str:
    """Two of three ranks share the columns of a convolution, and no rank waits for another."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "norm": nn.LayerNorm(8)})
    optimizer = optimizer_of(model, "ddp", "Muon")
    train(model, optimizer, 0, 1)
    assert optimizer.all_units[0].plan.strategies == ("split",)
    with pytest.raises(ValueError, match="ranks share its columns under strategy='split'"):
        spectral_dist.checkpoint.save(folder, model, optimizer)
    return "refused"


def test_columns_of_a_convolution_are_not_saved(tmp_path: Path) -> None:
    assert harness.run(3, conv_saved, str(tmp_path / "saved")) == ["refused"] * 3


def test_an_observer_needs_whole_matrices() -> None:
    model = build("")
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), strategy="split")
    optimizer.observers.append(lambda names, matrices: None)
    with pytest.raises(ValueError, match="strategy is 'split', but an observer or the rule needs"):
        train(model, optimizer, 0, 1)
