"""Whole tensors as DTensors beside a parameter, and back: how state of matrices is saved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a parameter is a DTensor."""
    return isinstance(parameter, DTensor)


def like_parameter(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of a whole quantity: a DTensor if its parameter is one, cut by its first side.

    Args:
        whole: equal on all ranks.
        parameter: that has the matrix. Mesh dimensions that shard it cut the quantity, others
            replicate it. Scalars stay plain.
    """
    if not isinstance(parameter, DTensor) or not whole.dim():
        return whole.clone()
    mesh = parameter.device_mesh
    placements = [
        Replicate() if placement.is_replicate() else Shard(0) for placement in parameter.placements
    ]
    cut = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return DTensor.from_local(
        cut.to_local().clone(),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )


def is_finite(value: Tensor) -> bool:
    """Return whether what this rank has of a tensor is finite."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(local.isfinite().all())


def whole(value: Tensor) -> Tensor:
    """Return a tensor whole; a collective call for DTensors."""
    return value.full_tensor() if isinstance(value, DTensor) else value
