"""Shard a Llama with FSDP2, HSDP and tensor parallelism, and clip its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.torch_config import TorchConfig

COLUMN_WISE = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("mlp.gate_proj", "mlp.up_proj"),
)
ROW_WISE = ("self_attn.o_proj", "mlp.down_proj")


def make_mesh(config: TorchConfig, ranks: Ranks) -> DeviceMesh:
    """Build the device mesh: shard, and around it replicate and tp, each only if above 1.

    Raises:
        ValueError: the sizes do not fit the number of ranks.
    """
    tensor_parallel = config.tensor_parallel
    if ranks.world % tensor_parallel:
        raise config.fail(
            "tensor_parallel", f"{ranks.world} rank(s) cannot be cut into {tensor_parallel}s"
        )
    data = ranks.world // tensor_parallel
    replicate, shard = config.mesh.replicate, config.mesh.shard
    if replicate == -1:
        replicate = data // shard
    elif shard == -1:
        shard = data // replicate
    if replicate * shard != data:
        raise config.fail(
            "mesh",
            f"{config.mesh.replicate} x {config.mesh.shard} ranks, each tensor_parallel"
            f" {tensor_parallel}, are not the {ranks.world} that there are",
        )
    sizes = {"replicate": replicate, "shard": shard, "tp": tensor_parallel}
    dims = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(ranks.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))


def shard(model: Any, mesh: DeviceMesh, config: TorchConfig) -> None:
    """Shard a LlamaForCausalLM in place: over tp first, then each decoder layer, then the rest."""
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        _check_heads(model.config, config)
        styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in COLUMN_WISE}
        styles |= {name: RowwiseParallel() for name in ROW_WISE}
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tp"], styles)
    data = mesh["replicate", "shard"] if "replicate" in names else mesh["shard"]
    policy = MixedPrecisionPolicy()
    compute_dtype = config.param_dtype
    if config.rotates and config.dtype != "float32":  # POET trains float32 parameters
        compute_dtype = compute_dtype or config.dtype
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(getattr(torch, compute_dtype), torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=data, mp_policy=policy)
    fully_shard(model, mesh=data, mp_policy=policy)


def _check_heads(model: Any, config: TorchConfig) -> None:
    """Raise a ValueError if tensor parallelism cannot divide the model's sizes evenly."""
    tensor_parallel = config.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(model, name) % tensor_parallel:
            raise config.fail(
                "tensor_parallel", f"the model's {name}, {getattr(model, name)}, is no multiple of"
                f" {tensor_parallel}"
            )  # fmt: skip


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``limit``.

    This does what torch.nn.utils.clip_grad_norm_ does, which cannot take plain tensors and
    DTensors, or DTensors of several meshes, together. A collective call of the meshes.

    Returns:
        The norm before, float32.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    squares: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for grad in grads:
        sharded_dims: tuple[int, ...] = ()
        if isinstance(grad, DTensor):
            assert not any(placement.is_partial() for placement in grad.placements)
            sharded_dims = tuple(
                d for d, placement in enumerate(grad.placements) if not placement.is_replicate()
            )
        mesh = grad.device_mesh if isinstance(grad, DTensor) else None
        norm = torch.linalg.vector_norm(_local(grad), dtype=torch.float32)
        squares.setdefault((mesh, sharded_dims), []).append(norm.square())
    totals = []
    for (mesh, sharded_dims), shard_squares in squares.items():  # in the same order on all ranks
        total = torch.stack(shard_squares).sum()
        for dim in sharded_dims:
            dist.all_reduce(total, group=mesh.get_group(dim))
        totals.append(total)
    norm = torch.stack(totals).sum().sqrt()
    torch._foreach_mul_([_local(grad) for grad in grads], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
