"""FSDP2: shards go to each matrix's owner, whole, and the update comes back.

torchrun --standalone --nproc_per_node 2 examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
from one_process import Model, batch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

import spectral_dist


def main() -> None:
    """Train on every rank's own part of the batch."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    model = Model().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    # after fully_shard: the parameters are DTensors now, and say how they are cut
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), lr=0.02, scalar_lr=3e-3)
    for step in range(60):
        tokens, targets = (part.to(device) for part in batch(step))
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        logits = model(tokens[mine])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[mine].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, sent {optimizer.comm_bytes:,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
