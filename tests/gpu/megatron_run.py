"""Megatron's own optimizers around ours, on one rank; a process of its own, as torchrun starts it.

    python -m tests.gpu.megatron_run cuda

Megatron's distributed optimizer, which steps on flat shards, and its plain one must give the same
parameters. On a CPU (cpu VERSION) Megatron is fetched by launch/test.sh, and told what CUDA is.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support import megatron_model as models

BOUND = 1e-5
NAMES = ("spectral_muon", "spectral_sumo", "spectral_root")


def train(name: str, device: torch.device, distributed: bool) -> dict[str, Tensor]:
    """Parameters after three steps."""
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    models.parallel()
    model = models.gpt()
    model.to(device)
    ddp = models.wrap(model, use_distributed_optimizer=distributed)
    settings = models.optimizer_config(ddp, optimizer=name, adam_eps=1e-4)
    options: dict[str, Any] = {"rank": 8} if name == "spectral_sumo" else {}
    if name != "spectral_sumo":
        options["polar_dtype"] = "float32"
    optimizer = get_spectral_megatron_optimizer(settings, [ddp], **options)
    for step in range(3):
        tokens, labels = (x.to(device) for x in models.batch(step, 0, 1))
        models.train_step(ddp, optimizer, (tokens, labels))
    return models.full_parameters(ddp)


def main() -> None:
    """Compare, and say what was compared."""
    device = torch.device(sys.argv[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = dist.HashStore()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if device.type == "cpu":
        from tests.support import megatron_cpu

        megatron_cpu.install(sys.argv[2])
    for name in NAMES:
        plain, flat = (train(name, device, distributed) for distributed in (False, True))
        assert plain.keys() == flat.keys()
        worst = max(float((plain[key] - flat[key]).abs().max()) for key in plain)
        assert worst <= BOUND, (name, worst)
        print(f"{name}: {len(plain)} parameters, largest difference {worst:.2g}")


if __name__ == "__main__":
    main()
