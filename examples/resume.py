"""Save on some ranks, go on with any other number of them, sharded or not.

torchrun --standalone --nproc_per_node 2 examples/resume.py runs/example     # FSDP2, 30 steps
python examples/resume.py runs/example                                       # one process, 30 more
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from one_process import Model, batch
from torch import nn
from torch.distributed.fsdp import fully_shard

import spectral_dist


def main(folder: Path) -> None:
    """Go on from what is in ``folder``, for 30 steps, and save there."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Model()
    if ranks > 1:
        fully_shard(model)
    optimizer = spectral_dist.SUMO(
        spectral_dist.param_groups(model), lr=0.02, scalar_lr=3e-3, rank=16
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    begin = 0
    checkpoints = sorted(folder.glob("step_*"))
    if checkpoints:
        extra = spectral_dist.checkpoint.load(checkpoints[-1], model, optimizer)
        schedule.load_state_dict(extra["schedule"])
        begin = extra["step"]
    for step in range(begin, begin + 30):
        tokens, targets = batch(step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    end = begin + 30
    extra = {"schedule": schedule.state_dict(), "step": end}
    spectral_dist.checkpoint.save(folder / f"step_{end:06d}", model, optimizer, **extra)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"step {end}: loss {loss.item():.4f}, from step {begin}, on {ranks} ranks")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
