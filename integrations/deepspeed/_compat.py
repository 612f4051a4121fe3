"""Every private or undocumented name of DeepSpeed that is used, and the releases that have them.

No other file of this integration uses one. So a release that renames something fails in this file
only, with the name in the error.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_dist._error_help import explained

__all__ = [
    "DEEPSPEED_OPTIMIZERS",
    "FROZEN_PARAM_FRAGMENTS",
    "MODEL_FILE_PREFIX",
    "MODEL_FILE_SUFFIX",
    "ZERO_FILE_PREFIX",
    "ZERO_SUPPORTED_OPTIMIZERS",
    "DeepSpeedEngine",
    "autocast_is_on",
]

LOWEST = (0, 19, 0)
NEWEST = (0, 19, 8)
"""The range of releases in which an engine trains as one process does, in every tested setting.

Below it 0.18.9 fails at stage 1, 0.17.6 silently trains to other numbers at stage 2, and 0.16.9
does not start. Above it there was no release to try.
"""


@explained
def check_version(version: str) -> None:
    """Raise unless this release of DeepSpeed is one that was tested.

    An untested release may silently train to wrong numbers, as those below ``LOWEST`` do.

    Args:
        version: as ``deepspeed.__version__`` has it, for example "0.19.2".

    Raises:
        ImportError: the release is outside of the tested range; says which ones work.
    """
    if LOWEST <= _version_tuple(version) <= NEWEST:
        return
    first, last = (".".join(map(str, end)) for end in (LOWEST, NEWEST))
    raise ImportError(
        f"spectral_dist works with deepspeed {first} to {last}, and {version} is installed, with"
        " which it may train to wrong numbers without a word. Install"
        f' "deepspeed=={last}", or a spectral_dist that knows {version}'
    )


def _version_tuple(version: str) -> tuple[int, ...]:
    """Return the three numbers of a version; () if it does not begin with three."""
    digits = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, digits.groups())) if digits else ()


check_version(deepspeed.__version__)  # before the names below, which another release may not have

from deepspeed.checkpoint.constants import (  # noqa: E402
    FROZEN_PARAM_FRAGMENTS,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    ZERO_FILE_PREFIX,
)
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.torch_autocast import (  # noqa: E402
    is_autocast_initialized as autocast_is_on,
)
from deepspeed.runtime.zero import stage_1_and_2  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import Init  # noqa: E402
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS  # noqa: E402

Configure = Callable[[Callable[..., None], DeepSpeedEngine, Any, Any], None]
"""A function of (DeepSpeed's own method, the engine, client_optimizer, model_parameters)."""
Distribute = Callable[[Callable[..., None], DeepSpeedEngine, nn.Module], None]
"""A function of (DeepSpeed's own method, the engine, the model)."""

WRAPPED = {
    "_configure_optimizer": ["self", "client_optimizer", "model_parameters"],
    "_configure_distributed_model": ["self", "model"],
    "_is_supported_optimizer": ["self", "optimizer_name"],
}
"""The engine's methods that ``wrap_engine`` wraps, and the parameters that each must have."""


class LossScale(Protocol):
    """The part of DeepSpeed's LossScaleConfig that ``fp16`` reads and, for a while, overwrites."""

    cur_scale: float


@explained
def wrap_engine(
    configure: Configure, distribute: Distribute, check_type: Callable[[str], None]
) -> None:
    """Wrap the methods of DeepSpeedEngine that every engine calls while it is being built.

    Args:
        configure: called in place of the method that builds the optimizer.
        distribute: called in place of the method that takes the model in, before anything else is
            done to the model.
        check_type: called with the JSON's optimizer type before DeepSpeed looks for that type.

    Raises:
        ImportError: this release has no such method, or one with other parameters.
    """
    for name, expected in WRAPPED.items():
        method = getattr(DeepSpeedEngine, name, None)
        parameters = list(inspect.signature(method).parameters) if method else None
        if parameters != expected:
            raise ImportError(
                f"deepspeed {deepspeed.__version__}: DeepSpeedEngine.{name} takes {parameters} in"
                f" place of {expected}; install deepspeed=={'.'.join(map(str, NEWEST))}"
            )
    configure_optimizer = DeepSpeedEngine._configure_optimizer
    distribute_model = DeepSpeedEngine._configure_distributed_model
    supported = DeepSpeedEngine._is_supported_optimizer

    @functools.wraps(configure_optimizer)
    def configured(engine: DeepSpeedEngine, client_optimizer: Any, model_parameters: Any) -> None:
        configure(configure_optimizer, engine, client_optimizer, model_parameters)

    @functools.wraps(distribute_model)
    def distributed(engine: DeepSpeedEngine, model: nn.Module) -> None:
        distribute(distribute_model, engine, model)

    @functools.wraps(supported)
    def is_supported(engine: DeepSpeedEngine, optimizer_name: str) -> bool:
        check_type(optimizer_name)
        return bool(supported(engine, optimizer_name))

    DeepSpeedEngine._configure_optimizer = configured
    DeepSpeedEngine._configure_distributed_model = distributed
    DeepSpeedEngine._is_supported_optimizer = is_supported


def set_model(engine: Any, model: nn.Module) -> None:
    """Set the model of an engine that is being built, which would set it itself only later."""
    engine._set_client_model(model)


def wrap_step(engine: Any, step: Callable[..., None]) -> None:
    """Replace this engine's optimizer step by ``step(original, *args, **kwargs)``.

    The engine calls it at accumulation boundaries only, and before the learning rate's schedule.
    """
    take_model_step = attribute(engine, "_take_model_step")

    @functools.wraps(take_model_step)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        step(take_model_step, *args, **kwargs)

    engine._take_model_step = wrapped


def zero_config(engine: Any) -> Any:
    """Return the parsed "zero_optimization" section of the engine's configuration."""
    return attribute(engine, "_config.zero_config")


def data_group(engine: Any) -> dist.ProcessGroup:
    """Return the process group over which ZeRO partitions the tensors that are stepped."""
    group: dist.ProcessGroup = attribute(engine, "seq_data_parallel_group")
    return group


def sub_groups(engine: Any) -> list[tuple[Tensor, int]] | None:
    """Return (flat tensor, index of its parameter group) of each stage-3 sub-group, or None.

    None at every other stage.
    """
    if engine.zero_optimization_stage() != 3:
        return None
    flats = attribute(engine, "optimizer.fp32_partitioned_groups_flat")
    group_of = attribute(engine, "optimizer.sub_group_to_group_id")
    return [(flat, group_of[index]) for index, flat in enumerate(flats)]


def sub_group_ends(engine: Any, flat: Tensor) -> tuple[int, int] | None:
    """Return the ids of the first and the last parameter in a flat tensor of stage 3, or None.

    None at every other stage.
    """
    if engine.zero_optimization_stage() != 3:
        return None
    first, last = attribute(flat, "ds_id").split("_")
    return int(first), int(last)


def is_first_micro_batch(engine: Any) -> bool:
    """Return whether stage 3 overwrites, and does not add to, gradients in this backward pass."""
    return bool(attribute(engine, "optimizer.micro_step_id") == 0)


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether stage 3 or ``zero.Init`` has partitioned this parameter and emptied it."""
    return hasattr(parameter, "ds_id")


def parameter_id(parameter: Tensor) -> int:
    """Return the id that stage 3 has given a parameter."""
    return int(attribute(parameter, "ds_id"))


def partition_of(parameter: Tensor) -> tuple[dist.ProcessGroup, int, int]:
    """Return (process group, elements in each rank's run, elements) of a stage-3 parameter."""
    group: dist.ProcessGroup = attribute(parameter, "ds_process_group")
    run_numel, numel = attribute(parameter, "partition_numel")(), attribute(parameter, "ds_numel")
    return group, int(run_numel), int(numel)


@contextmanager
def scaled_clip_limit(engine: Any, factor: float) -> Iterator[None]:
    """Multiply the engine's limit of gradient clipping by a factor, inside of the ``with`` block.

    Every optimizer wrapper of DeepSpeed has a limit of its own. Without a wrapper (float32 at
    stage 0) DeepSpeed reads the limit of the configuration.
    """
    wrapped = engine.optimizer is not engine.basic_optimizer
    holder, name = (
        (engine.optimizer, "clip_grad") if wrapped else (engine._config, "gradient_clipping")
    )
    limit = attribute(holder, name)
    if factor == 1 or not limit:
        yield
        return
    setattr(holder, name, limit * factor)
    try:
        yield
    finally:
        setattr(holder, name, limit)


def loss_scale_at_stage0(engine: Any) -> LossScale | None:
    """Return the loss scale of stage 0's fp16 wrapper, or None for every other engine."""
    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer) or not engine.fp16_enabled():
        return None
    scale: LossScale = attribute(engine, "optimizer.loss_scale_config")
    return scale


def argument(
    method: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Return the value of the parameter ``name`` in a call ``method(*args, **kwargs)``."""
    call = inspect.signature(method).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments[name]


def repair_on_cpu() -> None:
    """Repair two faults on CPUs that releases before 0.19.8 have, with any optimizer, silently.

    Those releases sort gradients by the names of tensor types, none of which is the name of a type
    on the CPU, so that stages 1 and 2 never sum gradients if ``contiguous_gradients`` is false.
    And where stage 3 has started several gathers, it waits for the last one only. That is enough
    for the stream of a GPU, but not for gloo, so that parameters are read before they have arrived.
    """
    if deepspeed.get_accelerator().device_name() != "cpu":
        return
    if not stage_1_and_2.split_half_float_double([torch.zeros(1)]):
        stage_1_and_2.split_half_float_double = _by_dtype
    if _version_tuple(deepspeed.__version__) < (0, 19, 8):
        gather = Init._allgather_params_coalesced

        @functools.wraps(gather)
        def one_by_one(self: Any, param_list: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
            for parameter in param_list:
                gather(self, [parameter], *args, **kwargs)

        Init._allgather_params_coalesced = one_by_one


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype, in the order in which the dtypes first occur."""
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault(tensor.dtype, []).append(tensor)
    return list(buckets.values())


def without_compiling() -> None:
    """Turn off DeepSpeed's shared-memory collectives, which g++ would take 45 s to compile.

    gloo communicates in their place. Call this before an engine is built.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_fp16_on_cpu() -> None:
    """Make DeepSpeed accept fp16 on CPUs that have no instructions for it, as torch itself does.

    On a GPU this changes nothing.
    """
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def attribute(owner: Any, path: str) -> Any:
    """Return ``owner.a.b`` of a path "a.b".

    Raises:
        RuntimeError: DeepSpeed has it no longer; names the release and the attribute.
    """
    value = owner
    for name in path.split("."):
        if not hasattr(value, name):
            raise RuntimeError(
                f"deepspeed {deepspeed.__version__} has no {type(value).__name__}.{name} where"
                f" spectral_dist looks for it ({path}); install"
                f" deepspeed=={'.'.join(map(str, NEWEST))}"
            )
        value = getattr(value, name)
    return value
