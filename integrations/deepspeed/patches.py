"""What DeepSpeed's engine does differently if it trains with an optimizer of ours."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat, poet
from spectral_dist.integrations.deepspeed._compat import DeepSpeedEngine
from spectral_dist.integrations.deepspeed.adam_moments import checkpoint_moments
from spectral_dist.integrations.deepspeed.config import refuse, refuse_for_poet
from spectral_dist.integrations.deepspeed.fp16 import scale_loss_at_stage0
from spectral_dist.integrations.deepspeed.latest import guard_latest
from spectral_dist.integrations.deepspeed.matrix_state import checkpoint_matrix_state
from spectral_dist.integrations.deepspeed.optimizers import BUILDING, TYPES
from spectral_dist.integrations.deepspeed.parts import check_parts, fail_with_other_stages
from spectral_dist.integrations.deepspeed.placement import ZeroPlacement
from spectral_dist.integrations.deepspeed.poet_checkpoint import checkpoint_poet, refuse_poet
from spectral_dist.integrations.deepspeed.stale import warn_of_stale_gradients
from spectral_dist.integrations.deepspeed.tiled_placement import placement_for
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules.group_options import RULE

_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]]
_engines = weakref.WeakKeyDictionary()
"""The engine that trains each model."""


def _refuse_used_model(module: nn.Module) -> None:
    """Raise a ValueError if a model is an engine, or an engine has partitioned or rotated it."""
    earlier = _engine_of(module)
    is_unchanged = earlier is None or not (
        earlier.zero_optimization_partition_weights() or isinstance(earlier.basic_optimizer, POET)
    )
    if isinstance(module, DeepSpeedEngine) or not is_unchanged:
        raise ValueError(
            "this model is already wrapped by a DeepSpeed engine; use that engine, or build the"
            " model anew before a second deepspeed.initialize"
        )


def _engine_of(module: nn.Module) -> DeepSpeedEngine | None:
    """Return the engine that already trains a model, or None."""
    reference = _engines.get(module)
    return None if reference is None else reference()


@explained
def _refuse_replaced_engine(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise a ValueError, as ``backward`` and ``step`` of an engine that has lost its model do."""
    raise ValueError(
        "a later deepspeed.initialize has taken this engine's model over, which this one cannot"
        " train any more; use the engine that it has returned"
    )


def _register_engine(engine: DeepSpeedEngine, client: ShardedOptimizer | None) -> None:
    """Note that this engine trains its model, and stop an earlier engine that did.

    There is an earlier one if ``deepspeed.initialize`` is called again, say with a smaller batch.

    Raises:
        ValueError: the earlier engine has changed the model, or had this optimizer.
    """
    _refuse_used_model(engine.module)
    earlier = _engine_of(engine.module)
    if earlier is not None:
        earlier.backward = earlier.step = _refuse_replaced_engine
        if hasattr(earlier.optimizer, "destroy"):  # its hooks would reduce the gradients, too
            earlier.optimizer.destroy()
    if client is not None and isinstance(client.placement, ZeroPlacement):
        raise ValueError(
            "this optimizer already belongs to a DeepSpeed engine; build a new one for a second"
        )
    _engines[engine.module] = weakref.ref(engine)


def _refuse_replaced_optimizer(client: Any) -> None:
    """Raise a ValueError if another optimizer was built of the parameter groups of one of ours."""
    for group in getattr(client, "param_groups", ()):
        if RULE in group:
            raise ValueError(
                f"spectral_dist's {group[RULE]} has been replaced by {type(client).__name__}, which"
                " has got its parameter groups: accelerate does so where the DeepSpeed JSON has"
                ' offload_optimizer. Write "zero_force_ds_cpu_optimizer": false into that JSON'
            )


@explained
def configure(
    original: Callable[..., None], engine: DeepSpeedEngine, client: Any, parameters: Any
) -> None:
    """Build an engine's optimizer, and prepare the engine for it if it is one of ours.

    Args:
        original: DeepSpeed's own method, which builds the optimizer.
        engine: the one that is being built; it has its module already.
        client: the optimizer that ``deepspeed.initialize`` was given, a function that builds one
            of parameters, or None.
        parameters: those that are trained.

    Raises:
        ValueError: a setting or an optimizer that is not supported.
    """
    if client is not None and not isinstance(client, torch.optim.Optimizer) and callable(client):
        client = client(parameters)  # as DeepSpeed would: is it one of ours?
    if not isinstance(client, ShardedOptimizer) and (
        client is not None or engine.optimizer_name() not in TYPES
    ):
        _refuse_replaced_optimizer(client)
        original(engine, client, parameters)
        return
    refuse(engine)
    if isinstance(client, POET):
        refuse_for_poet(engine)
        poet.check_clip(engine, client.options.clip_ramp)
    _register_engine(engine, client)
    placement_before = client.placement if client is not None else None
    if client is not None:
        client.move_to(placement_for(engine))
        if type(client) not in _compat.ZERO_SUPPORTED_OPTIMIZERS:  # a user's own subclass
            _compat.ZERO_SUPPORTED_OPTIMIZERS.append(type(client))
    token = BUILDING.set(engine)
    try:
        original(engine, client, parameters)
        check_parts(engine, engine.basic_optimizer)
    except BaseException:
        del _engines[engine.module]  # so that a second try with a corrected configuration works
        if client is not None and placement_before is not None:
            client.placement = placement_before
        raise
    finally:
        BUILDING.reset(token)
    optimizer = engine.basic_optimizer
    optimizer.placement.start(optimizer)
    checkpoint_moments(optimizer)
    guard_latest(engine)
    if isinstance(optimizer, SpectralOptimizer):
        checkpoint_matrix_state(engine, optimizer)
    scale_loss_at_stage0(engine)
    fail_with_other_stages(engine)
    warn_of_stale_gradients(engine, optimizer)
    if isinstance(optimizer, POET):
        poet.merge_after_steps(engine, optimizer)
        checkpoint_poet(engine, optimizer)
    else:
        refuse_poet(engine)


@explained
def distribute(original: Callable[..., None], engine: DeepSpeedEngine, model: nn.Module) -> None:
    """Take the model into an engine, after checks and, if the JSON names POET, its conversion.

    Args:
        original: DeepSpeed's own method, which takes the model in.
        engine: the one that is being built.
        model: as the user has passed it.

    Raises:
        ValueError: a setting that is not supported, or a model that another engine has changed.
    """
    client = engine.client_optimizer
    if isinstance(client, ShardedOptimizer) or (
        client is None and engine.optimizer_name() in TYPES
    ):
        _compat.set_model(engine, model)  # where ``refuse`` looks for it
        # now, since DeepSpeed then turns on torch_autocast, which stays on for later engines
        refuse(engine)
    if engine.optimizer_name() == poet.NAME and client is None:
        refuse_for_poet(engine)
        _refuse_used_model(model)
        poet.convert(engine, model)
    original(engine, model)
    poet.cast_skews(engine)
