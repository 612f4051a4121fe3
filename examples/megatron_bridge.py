"""Megatron-Bridge: the optimizer's config in its recipes, here with a loop. It needs GPUs.

torchrun --standalone --nproc_per_node 4 examples/megatron_bridge.py

A recipe of Bridge's takes the same config: cfg.optimizer = SpectralOptimizerConfig(...).
"""

import os

import megatron_core  # the example beside this one
import torch
import torch.distributed as dist
from megatron.bridge.training.config import SchedulerConfig
from megatron.bridge.training.optim import setup_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from one_process import batch

from spectral_dist.integrations.megatron_bridge import SpectralOptimizerConfig


def main() -> None:
    """Train: 2 tensor-parallel ranks share a part of the batch."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.set_default_device(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(0)
    model = megatron_core.build()
    config = SpectralOptimizerConfig(
        optimizer="spectral_muon", options={"momentum": 0.95}, lr=0.02, min_lr=0.0,
        weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True,
    )  # fmt: skip
    # the rest of the setup is done by Bridge's pretrain()
    config.finalize()
    schedule = SchedulerConfig(lr_decay_style="constant", lr_decay_iters=60, lr_warmup_iters=0)
    schedule.lr_warmup_steps, schedule.lr_decay_steps, schedule.wd_incr_steps = 0, 60, 60
    schedule.start_weight_decay = schedule.end_weight_decay = config.weight_decay
    optimizer, scheduler = setup_optimizer(config, schedule, [model])
    part = slice(
        parallel_state.get_data_parallel_rank(), None, parallel_state.get_data_parallel_world_size()
    )
    for step in range(60):
        tokens, targets = (x[part].to(torch.get_default_device()) for x in batch(step))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=targets).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        scheduler.step(1)
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
