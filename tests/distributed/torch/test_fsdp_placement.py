"""What MeshPlacement says of real DTensor parameters, against what each rank's tensor holds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import spectral_dist
from spectral_dist.placement.dtensor import MeshPlacement
from tests.distributed.torch.placed import Holder, inspect, mesh, wholes_of
from tests.support import harness


def all_agree(results, group, replicas=None):
    """Everyone's group and replicas are as given for its rank, and owners are equal among them."""
    for rank, found in enumerate(results):
        assert found
        for name, (ranks, copies, owner) in found.items():
            assert ranks == next(g for g in group if rank in g), name
            assert copies == next((g for g in replicas or [] if rank in g), [rank]), name
            assert all(results[r][name][2] == owner for r in (*ranks, *copies))


# -- fully_shard

UNEVEN = {"seven": (7, 5), "two": (2, 4), "one": (1, 6), "square": (4, 4), "tall": (9, 2)}


def rows(split):
    model = Holder(**UNEVEN, qkv=(12, 3))
    wholes = wholes_of(model)
    fully_shard(model)
    return inspect(model, wholes, split=split)


@pytest.mark.parametrize("split", [None, {"qkv": 3}, {"qkv": [2, 1, 1]}])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_uneven_rows(ranks, split):
    """Some ranks have nothing of the short ones; a split's blocks lie apart."""
    results = harness.run(ranks, rows, split)
    all_agree(results, [list(range(ranks))])
    assert len(results[0]) == len(UNEVEN) + (1 if split is None else 3)


def modules_alone():
    """Each module its own fully_shard, each with a default mesh of its own."""
    model = Holder(**UNEVEN)
    wholes = wholes_of(model)
    for module in model.children():
        fully_shard(module)
    fully_shard(model)
    return inspect(model, wholes)


def test_modules_sharded_each_on_its_own():
    all_agree(harness.run(2, modules_alone), [[0, 1]])


def along(dimension):
    model = Holder(a=(6, 4), b=(3, 8), stack=(2, 4, 8))
    wholes = wholes_of(model)
    fully_shard(model, shard_placement_fn=lambda p: Shard(min(dimension, p.ndim - 1)))
    assert any(p.placements == (Shard(1),) for p in model.parameters())
    return inspect(model, wholes, matrices=["stack"])


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_columns_by_shard_placement_fn(ranks, dimension):
    all_agree(harness.run(ranks, along, dimension), [list(range(ranks))])


def stacks(split):
    model = Holder(five=(5, 4, 3), two=(2, 6, 4), one=(1, 8, 2))
    wholes = wholes_of(model)
    fully_shard(model)
    return inspect(model, wholes, matrices=["."], split=split)


@pytest.mark.parametrize("split", [None, {"five": 2, "two": [2, 1], "one": 4}])
@pytest.mark.parametrize("ranks", [2, 3])
def test_stacks_of_experts(ranks, split):
    results = harness.run(ranks, stacks, split)
    all_agree(results, [list(range(ranks))])
    assert len(results[0]) == (8 if split is None else 5 * 2 + 2 * 2 + 4)


def convolutions(dimension):
    model = Holder(
        one=nn.Conv1d(4, 7 if dimension == 0 else 8, 5, bias=False),
        two=nn.Conv2d(2, 5 if dimension == 0 else 4, (3, 2), bias=False),
        three=nn.Conv3d(2, 3 if dimension == 0 else 4, 2, bias=False),
        flat=(3, 4),
    )
    wholes = wholes_of(model)
    fully_shard(model, shard_placement_fn=lambda p: Shard(dimension))
    return inspect(model, wholes)


@pytest.mark.parametrize("dimension", [0, 1])
def test_convolutions_are_matrices_and_no_stacks(dimension):
    results = harness.run(2, convolutions, dimension)
    all_agree(results, [[0, 1]])
    assert len(results[0]) == 4


# -- tensor parallelism, and both


def parallel(model, over):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, over, plan)


TP = {"up": (10, 6), "down": (6, 10), "plain": (5, 3)}


def tensor_parallel(shapes):
    model = Holder(**shapes)
    wholes = wholes_of(model)
    parallel(model, mesh((dist.get_world_size(),), ("tp",)))
    return inspect(model, wholes)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_and_columns_beside_plain_ones(ranks):
    results = harness.run(ranks, tensor_parallel, TP)
    everyone = list(range(ranks))
    for found in results:
        assert {n: found[n][0] for n in ("up.weight", "down.weight")} == dict.fromkeys(
            ("up.weight", "down.weight"), everyone
        )
        # the plain one, equal everywhere: one of them does the work
        assert found["plain.weight"][1] == everyone
        assert found["plain.weight"][2] == results[0]["plain.weight"][2]


def both_parallel(shapes):
    model = Holder(**shapes)
    wholes = wholes_of(model)
    both = mesh((2, 2), ("dp", "tp"))
    parallel(model, both["tp"])
    fully_shard(model, mesh=both["dp"])
    kinds = {type(q).__name__ for p in model.parameters() for q in p.placements}
    assert "_StridedShard" in kinds
    return inspect(model, wholes)


@pytest.mark.parametrize(
    "shapes", [TP, {"up": (8, 3), "down": (4, 8), "plain": (4, 4)},
               {"up": (6, 5), "down": (3, 2), "plain": (1, 4)}],
)  # fmt: skip
def test_fully_shard_over_tensor_parallelism(shapes):
    """Rows cut twice are interleaved: TP first, though its mesh dimension is the second."""
    results = harness.run(4, both_parallel, shapes)
    for rank, found in enumerate(results):
        assert found["up.weight"][:2] == ([0, 1, 2, 3], [rank])
        assert found["down.weight"][:2] == ([0, 1, 2, 3], [rank])
        # sharded over dp only, so that both ranks of tp have the same shards
        assert found["plain.weight"][0] == [[0, 2], [1, 3]][rank % 2]
        assert found["plain.weight"][1] == [[0, 1], [2, 3]][rank // 2]


def hsdp():
    model = Holder(**UNEVEN, stack=(3, 2, 4))
    wholes = wholes_of(model)
    fully_shard(model, mesh=mesh((2, 2), ("replicate", "shard")))
    return inspect(model, wholes, matrices=["stack"])


def test_hybrid_sharding():
    results = harness.run(4, hsdp)
    all_agree(results, [[0, 1], [2, 3]], [[0, 2], [1, 3]])
    owners = {owner for _, _, owner in results[0].values()}
    assert owners & {0, 1}
    assert owners & {2, 3}  # both replicas work


PLACEMENTS = [
    (Shard(0), Shard(0)), (Shard(1), Shard(1)), (Shard(0), Shard(1)), (Shard(1), Shard(0)),
    (Replicate(), Shard(0)), (Shard(1), Replicate()), (Replicate(), Replicate()),
    (Shard(-1), Shard(0)),
]  # fmt: skip


def distributed(placements, shape):
    """DTensors as a user makes them, uneven."""
    model = Holder(a=shape, b=(9, 5) if len(shape) == 2 else (2, 5, 7))
    wholes = wholes_of(model)
    over = mesh((2, 2), ("x", "y"))
    for module in model.children():
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), over, placements))
    return inspect(model, wholes, matrices=["."])


@pytest.mark.parametrize("shape", [(7, 6), (3, 5, 4)])
@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_any_placements_on_two_dimensions(placements, shape):
    results = harness.run(4, distributed, placements, shape)
    cut = [not q.is_replicate() for q in placements]
    along = {(True, True): [[0, 1, 2, 3]], (False, True): [[0, 1], [2, 3]],
             (True, False): [[0, 2], [1, 3]]}  # fmt: skip
    all_agree(results, along.get(tuple(cut), [[r] for r in range(4)]),
              along.get(tuple(not c for c in cut)))  # fmt: skip


def three_dimensional():
    """FSDP of a stack along experts and rows and columns at once."""
    model = Holder(stack=(4, 6, 5))
    wholes = wholes_of(model)
    over = mesh((2, 1, 2), ("x", "one", "y"))
    found = {}
    for placements in ([Shard(0), Replicate(), Shard(1)], [Shard(2), Shard(1), Shard(0)],
                       [Shard(1), Shard(0), Shard(1)]):  # fmt: skip
        copy = Holder(stack=(4, 6, 5))
        weight = distribute_tensor(copy.stack.weight.detach(), over, placements)
        copy.stack.weight = nn.Parameter(weight)
        found |= inspect(copy, wholes, matrices=["."])
    return found


def test_a_mesh_dimension_of_one_rank_counts_for_nothing():
    all_agree(harness.run(4, three_dimensional), [[0, 1, 2, 3]])


# -- plain parameters beside DTensors


def beside(kind):
    """A plain matrix equal on all ranks, and one that is each rank's own."""
    rank = dist.get_rank()
    model = Holder(up=(6, 4), down=(4, 6), shared=(4, 4), own=(5, 3))
    with torch.no_grad():
        if kind == "values":
            model.own.weight += 1000 * rank
        else:  # values say nothing: gradients do
            model.own.weight.zero_()
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(rank if name == "own.weight" else 7)
        p.grad = torch.randn(p.shape, generator=generator)
    wholes = wholes_of(model)
    parallel(model, mesh((dist.get_world_size(),), ("tp",)))
    for p in model.parameters():
        if isinstance(p, DTensor):
            p.grad = torch.zeros_like(p)
    return inspect(model, wholes)


@pytest.mark.parametrize("kind", ["values", "gradients"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_plain_parameters_are_shared_only_if_equal(ranks, kind):
    for rank, found in enumerate(harness.run(ranks, beside, kind)):
        assert found["shared.weight"][:2] == ([rank], list(range(ranks)))
        assert found["own.weight"] == ([rank], [rank], 0)


def own_and_sharded(rows):
    """An expert of each rank of ep, sharded over dp."""
    both = mesh((2, 2), ("dp", "ep"))
    model = Holder(own=(rows, 4), wide=(6, 4))
    with torch.no_grad():
        model.own.weight.add_(1000 * both["ep"].get_local_rank())
    wholes = wholes_of(model)
    model.wide.weight = nn.Parameter(
        distribute_tensor(model.wide.weight.detach(), both, [Shard(0), Shard(0)])
    )
    fully_shard(model.own, mesh=both["dp"])
    return inspect(model, wholes)


@pytest.mark.parametrize("rows", [4, 3, 1])
def test_experts_of_each_rank_sharded_over_others(rows):
    for rank, found in enumerate(harness.run(4, own_and_sharded, rows)):
        assert found["own.weight"][:2] == ([[0, 2], [1, 3]][rank % 2], [rank])


# -- errors


def test_without_any_mesh_it_is_whole_parameters():
    model = Holder(a=(4, 4), b=(3, 5))
    found = spectral_dist.param_groups(model)
    optimizer = spectral_dist.Muon(found, lr=0.1)
    assert isinstance(optimizer.placement, MeshPlacement)
    (unit,) = optimizer.units(optimizer.param_groups[0])
    assert unit.located.group is None
    assert unit.located.replicas is None
    assert unit.plan.owners == (0, 0)
