"""DeepSpeed: one import, and a type in the JSON. Any ZeRO stage.

torchrun --standalone --nproc_per_node 2 examples/deepspeed_zero.py
"""

import deepspeed
import torch
import torch.distributed as dist
from one_process import Model, batch
from torch import nn

CONFIG = {
    "train_batch_size": 32,
    "optimizer": {
        "type": "SpectralMuon",
        "params": {"lr": 0.02, "scalar_lr": 3e-3, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 60, "warmup_num_steps": 5},
    },
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1000,
}


def main() -> None:
    """Train on every rank's own part of the batch."""
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(model=Model(), config=CONFIG)
    for step in range(60):
        tokens, targets = (part.to(engine.device) for part in batch(step))
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        logits = engine(tokens[mine])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[mine].flatten())
        engine.backward(loss)
        engine.step()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
