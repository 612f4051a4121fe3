"""Tensor parallelism within FSDP2: a mesh of two dimensions, and nothing else to say.

torchrun --standalone --nproc_per_node 4 examples/tp_fsdp.py
"""

import os

import torch
import torch.distributed as dist
from one_process import Model, batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import spectral_dist


def main() -> None:
    """Train: 2 tensor-parallel ranks share a part of the batch."""
    on_gpu = torch.cuda.is_available()
    kind = "cuda" if on_gpu else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device(kind)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = init_device_mesh(kind, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Model().to(device)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), lr=0.02, scalar_lr=3e-3)
    for step in range(60):
        tokens, targets = (part.to(device) for part in batch(step))
        mine = slice(mesh["dp"].get_local_rank(), None, mesh["dp"].size())
        logits = model(tokens[mine])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[mine].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, sent {optimizer.comm_bytes:,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
