"""verl on a CPU: it has no platform of that name, so one is registered in this process."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from typing import Any

import torch


def install() -> None:
    """Import verl as its launcher makes every process do it, for the CPU; again: nothing."""
    if "verl" in sys.modules:
        return
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "spectral_dist.integrations.verl"
    os.environ["VERL_PLATFORM"] = "cpu"
    manager: Any = importlib.import_module("verl.plugin.platform.platform_manager")
    cuda: Any = importlib.import_module("verl.plugin.platform.platform_cuda")

    def device(self: Any) -> torch.device:
        return torch.device("cpu")

    methods = {
        "device_name": property(lambda self: "cpu"),
        "device_module": property(lambda self: torch.cpu),
        "is_available": lambda self: True,
        "current_device": device,
        "set_device": lambda self, index: None,
        "communication_backend_name": lambda self: "gloo",
        "empty_cache": lambda self: None,
    }
    manager.PlatformRegistry.register(platform="cpu")(
        type("PlatformCPU", (cuda.PlatformCUDA,), methods)
    )
    manager._current_platform = None
    cpu: Any = torch.cpu
    cpu.get_rng_state, cpu.set_rng_state = torch.get_rng_state, torch.set_rng_state
    cpu.empty_cache = lambda: None
    engine: Any = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    engine.load_fsdp_model_to_gpu = engine.offload_fsdp_model_to_cpu = _move
    engine.load_fsdp_optimizer = engine.offload_fsdp_optimizer = _move_state
    engine.CPUOffloadPolicy = partial(_without_pinning, engine.CPUOffloadPolicy)


def _without_pinning(policy: Any, pin_memory: bool) -> Any:
    """Build FSDP2's policy of parameters on the CPU; there is no device to pin memory for."""
    return policy(pin_memory=False)


@torch.no_grad()
def _move(model: Any, *others: Any) -> None:
    """Give parameters and buffers other memory, as verl's moves from and to a GPU do."""
    model._apply(torch.clone)


@torch.no_grad()
def _move_state(optimizer: Any, *others: Any) -> None:
    """Give the tensors of an optimizer's state other memory, as verl's moves do."""
    for group in optimizer.param_groups if optimizer.state else ():
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name, value in state.items():
                state[name] = value.clone() if isinstance(value, torch.Tensor) else value
