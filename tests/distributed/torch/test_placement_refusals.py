"""What MeshPlacement refuses: parameters whose place it does not know or cannot serve."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import spectral_dist
from tests.distributed.torch.placed import Holder, inspect, mesh, wholes_of
from tests.support import harness

# -- fully_shard


def beyond():
    model = Holder(two=nn.Conv2d(2, 4, (4, 2), bias=False))
    wholes = wholes_of(model)
    fully_shard(model, shard_placement_fn=lambda p: Shard(2))
    try:
        inspect(model, wholes)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_convolution_cut_in_its_window_is_refused():
    for text in harness.run(2, beyond):
        assert text.startswith("two.weight, ")
        assert "cut its first" in text


# -- errors


def error_of(make, **options):
    """The text of what building and placing raises."""
    try:
        model, group = make()
        optimizer = spectral_dist.Muon(
            spectral_dist.param_groups(model, **options), lr=0.1, process_group=group
        )
        for param_group in optimizer.param_groups:
            optimizer.units(param_group)
    except ValueError as error:
        return str(error)
    return "no error"


def partial():
    def make():
        over = mesh((dist.get_world_size(),), ("dp",))
        model = Holder(a=(4, 4), b=(4, 4))
        model.a.weight = nn.Parameter(distribute_tensor(model.a.weight.detach(), over, [Shard(0)]))
        pending = DTensor.from_local(model.b.weight.detach(), over, [Partial()])
        model.b.weight = nn.Parameter(pending)
        return model, None

    return error_of(make)


def test_a_partial_parameter_is_refused():
    for text in harness.run(2, partial):
        assert text.startswith("b.weight is ")
        assert "mesh dimension 0; shard or replicate it" in text


def copied_twice():
    def make():
        model = Holder(a=(4, 4))
        fully_shard(model, mesh=mesh((2, 2), ("replicate", "shard")))
        return model, dist.group.WORLD

    return error_of(make)


def test_replicas_by_mesh_and_by_process_group_are_refused():
    for text in harness.run(4, copied_twice):
        assert text.startswith("a.weight is replicated by its mesh ")
        assert "process_group" in text
        assert "leave one of them out" in text


def downwards():
    def make():
        over = DeviceMesh("cpu", list(range(dist.get_world_size()))[::-1], mesh_dim_names=("dp",))
        model = Holder(a=(4, 4))
        fully_shard(model, mesh=over)
        return model, None

    return error_of(make)


def test_a_mesh_that_numbers_ranks_downwards_is_refused():
    for text in harness.run(2, downwards):
        assert "does not number its ranks upwards" in text


def not_contiguous():
    def make():
        over = mesh((dist.get_world_size(),), ("dp",))
        model = Holder(a=(4, 6))
        mine = model.a.weight.detach()[:2].T.contiguous().T
        model.a.weight = nn.Parameter(DTensor.from_local(mine, over, [Shard(0)]))
        return model, None

    return error_of(make)


def test_a_local_tensor_in_another_memory_order_is_refused():
    for text in harness.run(2, not_contiguous):
        assert text == "a.weight is not contiguous; call .contiguous() on it first"


def unknown_layout():
    """Local tensors that are not what torch's placements would give."""
    over = mesh((dist.get_world_size(),), ("dp",))
    model = Holder(a=(5, 4))
    wholes = wholes_of(model)
    rank = dist.get_rank()
    mine = model.a.weight.detach()[(0, 1)[rank] : (1, 5)[rank]]  # 1 + 4 rows, not 3 + 2
    model.a.weight = nn.Parameter(
        DTensor.from_local(mine, over, [Shard(0)], run_check=False, shape=(5, 4), stride=(4, 1))
    )
    try:
        inspect(model, wholes)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_local_tensor_of_another_size_is_an_error():
    for text in harness.run(2, unknown_layout):
        assert text.startswith("a.weight: ")
        assert "its layout is not one that this release knows" in text
