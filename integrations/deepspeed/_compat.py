"""The private and undocumented names of DeepSpeed that are used here, and whose releases have them.

No other file of this integration names one: a release that renames something fails in one place,
with the name in the error.
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
"""Between them, and nowhere else, an engine trains as one process does, in every tested setting.

Seen below: 0.18.9 fails at stage 1, 0.17.6 trains to other numbers at stage 2 without a word,
0.16.9 does not start. Above, none was there to be tried.
"""


def check_version(version: str) -> None:
    """Raise unless this release of DeepSpeed is one that was tested.

    Others may be wrong without a word, as those below are.

    Raises:
        ImportError: says which releases work, and what to install.
    """
    if LOWEST <= _numbers(version) <= NEWEST:
        return
    first, last = (".".join(map(str, end)) for end in (LOWEST, NEWEST))
    raise ImportError(
        f"spectral_dist works with deepspeed {first} to {last}, and {version} is installed, with"
        " which it may train to wrong numbers without a word. Install"
        f' "deepspeed=={last}", or a spectral_dist that knows {version}'
    )


def _numbers(version: str) -> tuple[int, ...]:
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
"""Of the original, the engine, client_optimizer and model_parameters."""
Distribute = Callable[[Callable[..., None], DeepSpeedEngine, nn.Module], None]
"""Of the original, the engine and the model."""

WRAPPED = {
    "_configure_optimizer": ["self", "client_optimizer", "model_parameters"],
    "_configure_distributed_model": ["self", "model"],
    "_is_supported_optimizer": ["self", "optimizer_name"],
}
"""The engine's methods that ``wrap_engine`` puts itself around, and what each must take."""


class LossScale(Protocol):
    """The part of DeepSpeed's LossScaleConfig that is read and, for a moment, written."""

    cur_scale: float


def wrap_engine(
    configure: Configure, distribute: Distribute, check_type: Callable[[str], None]
) -> None:
    """Put these around what every engine calls while it is being built.

    Args:
        configure: builds the optimizer, and sees both it and the module.
        distribute: called with the model before anything is done to it.
        check_type: called with the JSON's optimizer type before DeepSpeed looks for it.

    Raises:
        ImportError: a method is gone, or takes something else.
    """
    for name, wanted in WRAPPED.items():
        method = getattr(DeepSpeedEngine, name, None)
        takes = list(inspect.signature(method).parameters) if method else None
        if takes != wanted:
            raise ImportError(
                f"deepspeed {deepspeed.__version__}: DeepSpeedEngine.{name} takes {takes} in place"
                f" of {wanted}; install deepspeed=={'.'.join(map(str, NEWEST))}"
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
    """Let an engine that is being built find its model already; it would set the same later."""
    engine._set_client_model(model)


def around_step(engine: Any, step: Callable[..., None]) -> None:
    """Have ``step(original, *args)`` called where this engine has its optimizer step.

    That is at accumulation boundaries only, and before the learning rate's schedule.
    """
    take_model_step = _of(engine, "_take_model_step")

    @functools.wraps(take_model_step)
    def taken(*args: Any, **kwargs: Any) -> None:
        step(take_model_step, *args, **kwargs)

    engine._take_model_step = taken


def zero_config(engine: Any) -> Any:
    """Return the engine's "zero_optimization" section, parsed."""
    return _of(engine, "_config.zero_config")


def data_group(engine: Any) -> dist.ProcessGroup:
    """Return the ranks over which ZeRO cuts what the optimizer steps on."""
    group: dist.ProcessGroup = _of(engine, "seq_data_parallel_group")
    return group


def sub_groups(engine: Any) -> list[tuple[Tensor, int]] | None:
    """Return stage 3's flat tensors, each with the index of its group; at other stages None."""
    if engine.zero_optimization_stage() != 3:
        return None
    flats = _of(engine, "optimizer.fp32_partitioned_groups_flat")
    group_of = _of(engine, "optimizer.sub_group_to_group_id")
    return [(flat, group_of[number]) for number, flat in enumerate(flats)]


def ends_of(engine: Any, flat: Tensor) -> tuple[int, int] | None:
    """Return the ids of the first and the last parameter in a flat tensor of stage 3.

    At other stages None.
    """
    if engine.zero_optimization_stage() != 3:
        return None
    first, last = _of(flat, "ds_id").split("_")
    return int(first), int(last)


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether stage 3 or ``zero.Init`` has cut this parameter and emptied it."""
    return hasattr(parameter, "ds_id")


def id_of(parameter: Tensor) -> int:
    """Return the number by which stage 3 knows a parameter."""
    return int(_of(parameter, "ds_id"))


def run_of(parameter: Tensor) -> tuple[dist.ProcessGroup, int, int]:
    """Return who holds a parameter of stage 3, in runs of how many elements, and of how many."""
    group: dist.ProcessGroup = _of(parameter, "ds_process_group")
    return group, int(_of(parameter, "partition_numel")()), int(_of(parameter, "ds_numel"))


@contextmanager
def clipping(engine: Any, factor: float) -> Iterator[None]:
    """Multiply the limit of gradient clipping for a while, wherever the stage keeps it.

    Every wrapper of DeepSpeed has a limit of its own; without one (float32 at stage 0) it is the
    configuration's that is read.
    """
    wrapped = engine.optimizer is not engine.basic_optimizer
    holder, name = (
        (engine.optimizer, "clip_grad") if wrapped else (engine._config, "gradient_clipping")
    )
    limit = _of(holder, name)
    if factor == 1 or not limit:
        yield
        return
    setattr(holder, name, limit * factor)
    try:
        yield
    finally:
        setattr(holder, name, limit)


def loss_scale_at_stage0(engine: Any) -> LossScale | None:
    """Return what stage 0's wrapper divides fp16 gradients by, or None for every other engine."""
    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer) or not engine.fp16_enabled():
        return None
    scale: LossScale = _of(engine, "optimizer.loss_scale_config")
    return scale


def argument(
    method: Callable[..., Any], name: str, given: Sequence[Any], named: dict[str, Any]
) -> Any:
    """Return what ``method(*given, **named)`` would get for its parameter of this name."""
    call = inspect.signature(method).bind(*given, **named)
    call.apply_defaults()
    return call.arguments[name]


def repair_on_cpu() -> None:
    """Repair what releases before 0.19.8 get wrong on CPUs, with any optimizer and no error.

    They sort gradients by the names of tensor types, none of which is that of a tensor on a CPU, so
    that stages 1 and 2 never sum them if ``contiguous_gradients`` is false. And where stage 3 waits
    for many gathers, it waits for the last: enough for the stream of a GPU, but not for gloo, so
    that parameters are read before they are there.
    """
    if deepspeed.get_accelerator().device_name() != "cpu":
        return
    if not stage_1_and_2.split_half_float_double([torch.zeros(1)]):
        stage_1_and_2.split_half_float_double = _by_dtype
    if _numbers(deepspeed.__version__) < (0, 19, 8):
        gather = Init._allgather_params_coalesced

        @functools.wraps(gather)
        def one_by_one(self: Any, param_list: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
            for parameter in param_list:
                gather(self, [parameter], *args, **kwargs)

        Init._allgather_params_coalesced = one_by_one


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault(tensor.dtype, []).append(tensor)
    return list(buckets.values())


def without_compiling() -> None:
    """Leave out DeepSpeed's collectives in shared memory, which g++ would compile for 45 s.

    gloo does the same. It must be called before an engine is built.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_fp16_on_cpu() -> None:
    """Have DeepSpeed accept fp16 on CPUs without instructions for it; torch multiplies it on any.

    On a GPU nothing is changed.
    """
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def _of(owner: Any, path: str) -> Any:
    """Return ``owner.a.b``; RuntimeError, which names the release, if DeepSpeed has it no more."""
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
