"""The option ``machine``: teams by seconds, ``auto`` takes them, and exchanges in two steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import spectral_dist
from tests.distributed.torch.test_split_torch import train, whole
from tests.support import harness

SLOW = {"flops": 1e3, "flops_wide": 1e3}
"""Work takes so long that sharing it always pays, whatever is sent."""
APART = {**SLOW, "ranks_per_host": 2, "host_bandwidth": 1.0}
"""But for teams on several hosts."""
MESSAGES = {"ranks_per_host": 2, "message": 1.0}
"""Messages take so long that exchanges go in two steps."""


def build(kind: str, shapes: list[tuple[int, int]]) -> nn.ModuleDict:
    torch.manual_seed(3)
    layers: dict[str, nn.Module] = {
        f"layer{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(shapes)
    }
    model = nn.ModuleDict({**layers, "norm": nn.LayerNorm(8)})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) if kind == "hsdp" else None
    if kind in ("fsdp", "hsdp"):
        for layer in layers.values():
            fully_shard(layer, mesh=mesh)
    return model


def trained(
    kind: str, shapes: list[tuple[int, int]], title: str = "Muon", **options: Any
) -> tuple[dict[str, Tensor], list[int], dict[str, int], list[str]]:
    """Weights, the sizes of teams, the calls of collectives, and warnings."""
    model = build(kind, shapes)
    is_observed = options.pop("observed", False)
    if kind == "ddp":
        options["process_group"] = dist.group.WORLD
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = spectral_dist.param_groups(model)
        optimizer = getattr(spectral_dist, title)(groups, lr=0.02, **options)
        if is_observed:
            optimizer.observers.append(lambda names, matrices: None)
        train(model, optimizer, 0, 3)
    plan = optimizer.all_units[0].plan
    teams = [bucket.team for bucket in plan.buckets]
    said = [str(w.message) for w in caught if "strategy" in str(w.message)]
    return whole(model), teams, dict(optimizer.meter.calls), said


UNEVEN = [(5, 7), (3, 2), (9, 4)]
"""On four ranks one has no matrix, and some have no rows of one."""


@pytest.mark.parametrize("title", ["Muon", "SUMO"])
def test_fsdp2_in_two_steps_is_bitwise_the_same(title: str) -> None:
    at_once = harness.run(4, trained, "fsdp", UNEVEN, title, strategy="owner")
    in_two = harness.run(4, trained, "fsdp", UNEVEN, title, strategy="owner", machine=MESSAGES)
    for (wanted, _, once, _), (weights, _, twice, _) in zip(at_once, in_two, strict=True):
        assert all(torch.equal(weights[name], value) for name, value in wanted.items())
        assert twice["all_to_all"] == 2 * once["all_to_all"] > 0


def test_slabs_in_two_steps_are_bitwise_the_same() -> None:
    """``gram``, which makes other all-to-alls too, and teams."""
    for strategy, hosts in (("gram", {"ranks_per_host": 4}), ("split", SLOW)):
        shapes = [(8, 12)] * 2
        at_once = harness.run(4, trained, "fsdp", shapes, strategy=strategy, machine=hosts)
        hosts = {**hosts, **MESSAGES}
        in_two = harness.run(4, trained, "fsdp", shapes, strategy=strategy, machine=hosts)
        for (wanted, teams, once, _), (weights, _, twice, _) in zip(at_once, in_two, strict=True):
            assert teams == [2 if strategy == "split" else 1]
            assert all(torch.equal(weights[name], value) for name, value in wanted.items())
            assert twice["all_to_all"] == once["all_to_all"] + 2 * 3  # two more in each step


ONE = [(16, 24)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("strategy", ["auto", "split"])
def test_teams_are_within_a_host_where_links_between_hosts_are_slow(
    kind: str, strategy: str
) -> None:
    """A team stays within a host; under HSDP each replica is one."""
    alone, _, _, _ = trained("", ONE)
    for machine, size in ((APART, 2), (SLOW, 2 if kind == "hsdp" else 4)):
        results = harness.run(4, trained, kind, ONE, strategy=strategy, machine=machine)
        for weights, teams, _, said in results:
            assert (teams, said) == ([size], [])
            for name, wanted in alone.items():
                torch.testing.assert_close(weights[name], wanted, rtol=1e-6, atol=1e-6)


def apart(machine: dict[str, float]) -> list[int]:
    """The teams where two copies of a layer are cut over the first and third, second and fourth."""
    model = build("", ONE)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "copies"))
    fully_shard(model["layer0"], mesh=mesh["shards"])
    groups = spectral_dist.param_groups(model)
    optimizer = spectral_dist.Muon(groups, strategy="split", machine=machine)
    train(model, optimizer, 0, 1)
    return [bucket.team for bucket in optimizer.all_units[0].plan.buckets]


def test_hosts_are_found_by_the_ranks_of_the_job() -> None:
    """Ranks 0 and 2 are on different hosts, though they are neighbours in their group."""
    assert harness.run(4, apart, APART) == [[1]] * 4
    assert harness.run(4, apart, {**APART, "ranks_per_host": 4}) == [[2]] * 4


@pytest.mark.parametrize(
    ("title", "options"),
    [
        ("SUMO", {}),
        ("PolarGrad", {}),  # by QDWH
        ("ROOT", {"adapt_every": 2}),
        ("Muon", {"observed": True}),
        ("Muon", {"polar": "zolo"}),
        ("Muon", {"machine": {"latency": 1e9, "host_latency": 1e9}}),
        ("Muon", {"machine": None}),
    ],
)
def test_auto_leaves_to_owners_in_silence_what_cannot_be_shared(
    title: str, options: dict[str, Any]
) -> None:
    options = {"machine": SLOW, **options}
    at_owners = harness.run(2, trained, "fsdp", ONE, title, strategy="owner", **{
        name: value for name, value in options.items() if name != "machine"
    })  # fmt: skip
    found = harness.run(2, trained, "fsdp", ONE, title, **options)
    for (wanted, _, calls, said), (weights, teams, ours, also) in zip(
        at_owners, found, strict=True
    ):
        assert (teams, ours, also) == ([1], calls, said)
        assert all(torch.equal(weights[name], value) for name, value in wanted.items())


def disagreeing() -> str:
    """Replicas of two ranks on hosts of three: ranks 2 and 3 are apart, so no team is a pair."""
    _, teams, _, _ = trained("hsdp", ONE, strategy="split", machine={**APART, "ranks_per_host": 3})
    return str(teams)


def test_replicas_on_other_hosts_make_one_plan() -> None:
    assert harness.run(4, disagreeing) == ["[1]"] * 4
