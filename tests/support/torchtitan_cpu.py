"""torchtitan 0.3 on CPUs: it asks for GPUs in a dozen places, none of which is the optimizer's."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleSingle


def install() -> None:
    """Let torchtitan train on CPUs, in this process; before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    _fill_in_device_module()
    barrier = dist.barrier
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
    set_factor = FSDPModule.set_gradient_divide_factor

    def divide_after_sum(module: FSDPModule, factor: float) -> None:
        set_factor(module, factor)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM

    FSDPModule.set_gradient_divide_factor = divide_after_sum
    PipelineScheduleSingle.step = _step_of_microbatches
    _patch_torchtitan()


def _step_of_microbatches(
    schedule: Any, *, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None,
    losses: Any = None, loss_kwargs: Any = None, return_outputs: bool = False,
) -> None:  # fmt: skip
    """Take what torchtitan has cut already, as releases of torch after 2.13 do."""
    schedule._stage.has_backward = schedule._has_backward
    schedule._stage.clear_runtime_states()
    schedule._step_microbatches(
        arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs
    )


def _fill_in_device_module() -> None:
    """Give torch.cpu what the monitor of a GPU's memory reads."""
    torch.cpu.get_device_name = lambda device=None: "cpu"
    torch.cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=1 << 34)
    torch.cpu.memory_stats = lambda *args: {}
    for name in ("reset_peak_memory_stats", "empty_cache", "set_device"):
        setattr(torch.cpu, name, lambda *args: None)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: Any = None, enable_gqa: bool = False,
    **others: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Causal attention; flex attention has no backward on CPUs."""
    values = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
    )
    return values, SimpleNamespace(lse=None)


def _patch_torchtitan() -> None:
    from torchtitan import trainer
    from torchtitan.distributed import utils
    from torchtitan.models.common import attention

    attention.FlexAttention._compiled_flex_attn = _dense
    attention._compiled_create_block_mask = attention.create_block_mask
    # torch 2.13 has no torch.distributed.set_timeout
    utils.set_pg_timeouts = lambda *args, **kwargs: None
    # the Trainer's last two seconds are a sleep
    waits = SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter)
    trainer.time = waits
