"""Checks that refuse DeepSpeed configurations which are not supported, before training starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.integrations.deepspeed._compat import (
    DEEPSPEED_OPTIMIZERS,
    autocast_is_on,
    zero_config,
)
from spectral_dist.integrations.deepspeed._compat_groups import (
    has_auto_experts,
    has_experts,
    shares_sequences,
    splits_sequences_apart,
)
from spectral_dist.integrations.deepspeed._compat_tiles import KNOWS_TILES


@explained
def refuse_type(name: str | None, ours: Iterable[str]) -> None:
    """Raise if the JSON's optimizer type is unknown to DeepSpeed, to torch and to us.

    Args:
        name: the JSON's optimizer.type, or None.
        ours: the types that this package registers.

    Raises:
        ValueError: says the nearest name, and the list.
    """
    if name is None or name.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, name):
        return
    raise ValueError(f'optimizer.type is "{name}", which is unknown{suggest(name, ours)}')


def refuse_for_poet(engine: Any) -> None:
    """Raise if an engine would round POET's frozen weights W, or could not write merged ones.

    Raises:
        ValueError: names the setting and what works instead.
    """
    zero = zero_config(engine)
    offload = zero.offload_param
    device = None if offload is None else str(getattr(offload.device, "value", offload.device))
    rounded = " stores or gathers W in 8 bits, and each merge would round it again: set it to false"
    cases: list[tuple[bool, str]] = [
        (zero.zero_quantized_weights, "zero_quantized_weights" + rounded),
        (
            zero.zero_quantized_nontrainable_weights,
            "zero_quantized_nontrainable_weights" + rounded,
        ),
        (device == "nvme", 'offload_param.device "nvme" is not supported: use "cpu"'),
        (
            engine.pipeline_parallelism,
            "a PipelineModule keeps its layers in a list of its own, in which a conversion would"
            " not replace them: use ZeRO without pipeline stages",
        ),
        (
            has_experts(engine.module),
            "rotations of experts in layers of deepspeed.moe would lack the marks by which"
            " DeepSpeed keeps gradients of different experts apart: use dense layers",
        ),
    ]
    for applies, problem in cases:
        if applies:
            raise ValueError(f"POET under DeepSpeed: {problem}")


def refuse(engine: Any) -> None:
    """Raise if an engine stores parameters in a way that ``ZeroPlacement`` does not know.

    Raises:
        ValueError: names the setting, the reason and what works instead.
    """
    zero = zero_config(engine)
    offload = zero.offload_optimizer
    device = None if offload is None else str(getattr(offload.device, "value", offload.device))
    cases: list[tuple[bool, str, str]] = [
        (
            engine.has_moe_layers and engine.client_optimizer is not None,
            "layers of deepspeed.moe with an optimizer built in code, in which experts have neither"
            " groups nor names of their own",
            "name the optimizer in the JSON",
        ),
        (has_auto_experts(engine), "expert_parallel (AutoEP)", "use layers of deepspeed.moe"),
        (
            engine.pipeline_parallelism and not zero.stage and bool(engine.gradient_clipping()),
            "gradient_clipping of a PipelineModule at stage 0, where DeepSpeed takes the first"
            " pipeline stage's norm for that of the model",
            'use stage 1, or write "gradient_clipping": 0.0',
        ),
        (
            engine.autotp_size() > 1 and not KNOWS_TILES,
            "tensor_parallel.autotp_size above 1 before deepspeed 0.19.8",
            'install "deepspeed==0.19.8", or set it to 1',
        ),
        *(
            (
                engine.autotp_size() > 1 and beside,
                f"tensor_parallel.autotp_size above 1 together with {what}, which was never tried",
                "use one of the two",
            )
            for beside, what in _beside_tensor_parallelism(engine)
        ),
        (
            splits_sequences_apart(engine),
            "sequence_parallel_size beside data_parallel_size, or mesh_param, with which DeepSpeed"
            " does not add up gradients over the ranks of a sequence",
            "pass mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp to"
            " deepspeed.initialize, after its initialize_sequence_parallel(size)",
        ),
        (
            getattr(zero, "mics_shard_size", 0) > 0,  # DeepSpeed 0.19.8 refuses it by itself
            "mics_shard_size, which later releases of DeepSpeed have no longer",
            "write zero_hpz_partition_size in its place",
        ),
        (zero.elastic_checkpoint, "elastic_checkpoint", "use the universal checkpoint"),
        (zero.zenflow is not None, "zenflow", "remove it"),
        (
            device == "nvme",
            'offload_optimizer.device "nvme", whose swapper empties the optimizer\'s state between'
            " steps, which was never tried",
            'use "cpu"',
        ),
        (
            device == "cpu" and (offload.ratio < 1 or offload.super_offload),
            "offload_optimizer.ratio below 1 or super_offload, which use DeepSpeed's own Adam",
            "set ratio to 1.0 and super_offload to false",
        ),
        (
            engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
            'torch_autocast with dtype "float16"',
            'use the "fp16" section, or bfloat16',
        ),
        (
            autocast_is_on() and not engine.torch_autocast_enabled(),
            "an engine without torch_autocast after one with it in the same process, where"
            " DeepSpeed leaves it half on",
            "start another process",
        ),
        (
            any(getattr(p, "use_muon", False) for p in engine.module.parameters()),
            "use_muon on parameters, on which ZeRO would run its own update as well",
            "delete the attribute",
        ),
    ]
    for applies, setting, remedy in cases:
        if applies:
            raise ValueError(
                f"spectral optimizers do not support {setting} under DeepSpeed: {remedy}"
            )


def _beside_tensor_parallelism(engine: Any) -> list[tuple[bool, str]]:
    """Return (whether it is there, its name) of what AutoTP was not tried with."""
    return [
        (engine.pipeline_parallelism, "a PipelineModule"),
        (has_experts(engine.module), "layers of deepspeed.moe"),
        (zero_config(engine).zero_hpz_partition_size > 1, "zero_hpz_partition_size above 1"),
        (shares_sequences(engine), "sequence parallelism"),
    ]
