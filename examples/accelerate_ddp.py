"""Accelerate: SUMO under DDP, and a checkpoint of save_state from which the same command goes on.

torchrun --standalone --nproc_per_node 2 examples/accelerate_ddp.py runs/example    # 30 steps
torchrun --standalone --nproc_per_node 2 examples/accelerate_ddp.py runs/example    # 30 more
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from one_process import Model, batch
from torch import nn

import spectral_dist


def main(folder: Path) -> None:
    """Go on from what is in ``folder``, for 30 steps, and save there."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = Model()
    # before prepare(), so the ranks that will hold replicas are named
    optimizer = spectral_dist.SUMO(
        spectral_dist.param_groups(model), lr=0.02, scalar_lr=3e-3, rank=16,
        process_group=dist.group.WORLD,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(model, optimizer)
    # accelerate saves rank 0's state, and SUMO's is at the owners of matrices
    accelerator.register_save_state_pre_hook(
        lambda *_: optimizer.optimizer.consolidate_state_dict()
    )
    checkpoints = sorted(folder.glob("step_*"))
    begin = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
    for step in range(begin, begin + 30):
        tokens, targets = (part.to(accelerator.device) for part in batch(step))
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        logits = model(tokens[mine])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[mine].flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    end = begin + 30
    accelerator.save_state(str(folder / f"step_{end:06d}"))
    accelerator.print(f"step {end}: loss {loss.item():.4f}, from step {begin}")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
