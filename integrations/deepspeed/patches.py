"""What DeepSpeed's engine does otherwise when one of our optimizers is named, or was given."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.deepspeed import poet as rotated
from spectral_dist.integrations.deepspeed._compat import DeepSpeedEngine
from spectral_dist.integrations.deepspeed.adam_moments import keep_checkpoints
from spectral_dist.integrations.deepspeed.config import refuse, refuse_for_poet
from spectral_dist.integrations.deepspeed.fp16 import scale_loss_at_stage0
from spectral_dist.integrations.deepspeed.latest import keep_latest
from spectral_dist.integrations.deepspeed.matrix_state import keep_matrix_state
from spectral_dist.integrations.deepspeed.optimizers import BUILDING, TYPES
from spectral_dist.integrations.deepspeed.placement import ZeroPlacement
from spectral_dist.integrations.deepspeed.poet_checkpoint import keep_poet, refuse_poet
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules.group_options import RULE

_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]]
_engines = weakref.WeakKeyDictionary()


def _refuse_second(module: nn.Module) -> None:
    """Raise a ValueError for a model that is an engine, or that one has partitioned or rotated."""
    former = _former(module)
    is_whole = former is None or not (
        former.zero_optimization_partition_weights() or isinstance(former.basic_optimizer, POET)
    )
    if isinstance(module, DeepSpeedEngine) or not is_whole:
        raise ValueError(
            "this model is already wrapped by a DeepSpeed engine; use that engine, or build the"
            " model anew before a second deepspeed.initialize"
        )


def _former(module: nn.Module) -> DeepSpeedEngine | None:
    """Return the engine that trains a model already, if there is one."""
    reference = _engines.get(module)
    return None if reference is None else reference()


def _refuse_former(*given: Any, **options: Any) -> NoReturn:
    raise ValueError(
        "a later deepspeed.initialize has taken this engine's model over, which this one cannot"
        " train any more; use the engine that it has returned"
    )


def _claim(engine: DeepSpeedEngine, client: ShardedOptimizer | None) -> None:
    """Give the model to this engine: one that had it, as before a smaller batch, has no more."""
    _refuse_second(engine.module)
    former = _former(engine.module)
    if former is not None:
        former.backward = former.step = _refuse_former
        if hasattr(former.optimizer, "destroy"):  # its hooks would reduce the gradients, too
            former.optimizer.destroy()
    if client is not None and isinstance(client.placement, ZeroPlacement):
        raise ValueError(
            "this optimizer already belongs to a DeepSpeed engine; build a new one for a second"
        )
    _engines[engine.module] = weakref.ref(engine)


def _refuse_replaced(client: Any) -> None:
    """Raise a ValueError for another optimizer that was made of the groups of one of ours."""
    for group in getattr(client, "param_groups", ()):
        if RULE in group:
            raise ValueError(
                f"spectral_dist's {group[RULE]} has been replaced by {type(client).__name__}, which"
                " has got its parameter groups: accelerate does so where the DeepSpeed JSON has"
                ' offload_optimizer. Write "zero_force_ds_cpu_optimizer": false into that JSON'
            )


def configure(
    original: Callable[..., None], engine: DeepSpeedEngine, client: Any, parameters: Any
) -> None:
    """Build the optimizer of an engine, by ``original`` if it is none of ours.

    Args:
        original: DeepSpeed's own method.
        engine: that is being built; its module is there already.
        client: the optimizer, or what makes one, that ``deepspeed.initialize`` was given, or None.
        parameters: to be trained.

    Raises:
        ValueError: a setting or an optimizer that cannot be right.
    """
    if client is not None and not isinstance(client, torch.optim.Optimizer) and callable(client):
        client = client(parameters)  # as DeepSpeed would, to see what it makes
    if not isinstance(client, ShardedOptimizer) and (
        client is not None or engine.optimizer_name() not in TYPES
    ):
        _refuse_replaced(client)
        original(engine, client, parameters)
        return
    refuse(engine)
    if isinstance(client, POET):
        refuse_for_poet(engine)
        rotated.check_clip(engine, client.options.clip_ramp)
    _claim(engine, client)
    before = client.placement if client is not None else None
    if client is not None:
        client.move_to(ZeroPlacement(engine))
        if type(client) not in _compat.ZERO_SUPPORTED_OPTIMIZERS:  # a subclass of a user's own
            _compat.ZERO_SUPPORTED_OPTIMIZERS.append(type(client))
    token = BUILDING.set(engine)
    try:
        original(engine, client, parameters)
    except BaseException:
        del _engines[engine.module]  # so that a second try with a mended config is not refused
        if client is not None and before is not None:
            client.placement = before
        raise
    finally:
        BUILDING.reset(token)
    optimizer = engine.basic_optimizer
    optimizer.placement.start(optimizer)
    keep_checkpoints(optimizer)
    keep_latest(engine)
    if isinstance(optimizer, SpectralOptimizer):
        keep_matrix_state(engine, optimizer)
    scale_loss_at_stage0(engine)
    if isinstance(optimizer, POET):
        rotated.merge_after_steps(engine, optimizer)
        keep_poet(engine, optimizer)
    else:
        refuse_poet(engine)


def distribute(original: Callable[..., None], engine: DeepSpeedEngine, model: nn.Module) -> None:
    """Take the model into an engine by ``original``, converted before if POET is named.

    Raises:
        ValueError: a setting that cannot be right, or a model that another engine has changed.
    """
    client = engine.client_optimizer
    if isinstance(client, ShardedOptimizer) or (
        client is None and engine.optimizer_name() in TYPES
    ):
        _compat.set_model(engine, model)  # where ``refuse`` looks for it
        refuse(engine)  # before DeepSpeed turns on what stays on for later engines: torch_autocast
    if engine.optimizer_name() == rotated.NAME and client is None:
        refuse_for_poet(engine)
        _refuse_second(model)
        rotated.convert(engine, model)
    original(engine, model)
    rotated.cast_skews(engine)
