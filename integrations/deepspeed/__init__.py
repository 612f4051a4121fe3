"""DeepSpeed: import this once, then name "SpectralMuon" in the JSON; any ZeRO stage.

It registers the class where DeepSpeed looks for optimizers it does not know (``torch.optim``), and
wraps a private method of the engine, which sees both the module and the optimizer: that is how
embeddings and heads are found with nothing tagged. A second one is wrapped to say what an unknown
type may have meant, and a third to convert the model for POET before anything else is done to it.
All of them stand in ``_compat``, as every private name of DeepSpeed does.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import nn

from spectral_dist.core.named import class_of
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.deepspeed import poet as rotated
from spectral_dist.integrations.deepspeed._compat import DeepSpeedEngine
from spectral_dist.integrations.deepspeed.adam_moments import keep_checkpoints
from spectral_dist.integrations.deepspeed.config import refuse, refuse_for_poet, refuse_type
from spectral_dist.integrations.deepspeed.fp16 import scale_loss_at_stage0
from spectral_dist.integrations.deepspeed.latest import keep_latest
from spectral_dist.integrations.deepspeed.matrix_state import keep_matrix_state
from spectral_dist.integrations.deepspeed.placement import ZeroPlacement
from spectral_dist.integrations.deepspeed.poet_checkpoint import keep_poet, refuse_poet
from spectral_dist.params.classify import classify
from spectral_dist.params.param_groups import grouped
from spectral_dist.params.table import show
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.group_options import RULE
from spectral_dist.rules.options import ROUTING

_building: ContextVar[DeepSpeedEngine | None] = ContextVar("engine being built", default=None)
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]]
_engines = weakref.WeakKeyDictionary()


class FromJSON(ShardedOptimizer):
    """An optimizer as DeepSpeed's JSON builds it: from parameters and plain options.

    Takes ``matrices``, ``scalars`` and ``split`` of ``param_groups`` beside the optimizer's own.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        engine = _building.get()
        routing = {name: options.pop(name) for name in ROUTING if name in options}
        if engine is None:
            _refuse_in_code(type(self).__name__)
        self.options_type.from_user(options, type(self).__name__)  # before the table: it stands out
        routes = classify(engine.module, **routing)
        show(routes)
        groups = grouped(_trainable(params), routes, self.options_type)
        super().__init__(groups, placement=ZeroPlacement(engine), **options)


def _refuse_in_code(name: str) -> NoReturn:
    raise ValueError(
        f"{name} is the optimizer that DeepSpeed builds from its JSON; in code, write"
        f" spectral_dist.{name.removeprefix('Spectral')}(spectral_dist.param_groups(model), ...)"
    )


def _trainable(params: Iterable[Any]) -> list[Any]:
    """Without the frozen ones: DeepSpeed hands over all of module.parameters()."""
    kept = []
    for item in params:
        if isinstance(item, dict):
            kept.append({**item, "params": _trainable(item["params"])})
        elif (item[1] if isinstance(item, tuple) else item).requires_grad:
            kept.append(item)
    return kept


class SpectralPOET(FromJSON, POET):
    """``spectral_dist.POET`` named in a DeepSpeed JSON; the engine has converted the model by it.

    Takes the settings of ``poet.convert`` beside the optimizer's own, and no ``split``.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        engine = _building.get()
        if engine is None:
            _refuse_in_code(type(self).__name__)
        _, options = rotated.divided(options)
        super().__init__(rotated.with_skews(params, engine.module), **options)


TYPES: dict[str, type[ShardedOptimizer]] = {}
"""Our optimizers by the type that the JSON names."""


def __getattr__(name: str) -> Any:
    """Return the class of a type, as ``SpectralMuon``."""
    if name in TYPES:
        return TYPES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _name(entry: registry.Entry) -> None:
    """Make an optimizer known to DeepSpeed, under its type in the JSON and in code."""
    kind: type[ShardedOptimizer] = SpectralPOET
    in_code: type[ShardedOptimizer] = POET
    if entry.rule is not None:
        in_code = class_of(entry)
        doc = f"``spectral_dist.{entry.title}`` named in a DeepSpeed JSON."
        namespace = {"__doc__": doc, "__module__": __name__}
        kind = type(entry.deepspeed_type, (FromJSON, in_code), namespace)
    TYPES[entry.deepspeed_type] = kind
    setattr(torch.optim, entry.deepspeed_type, kind)
    _compat.ZERO_SUPPORTED_OPTIMIZERS.extend([in_code, kind])


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


def _configure(
    original: Callable[..., None], engine: DeepSpeedEngine, client: Any, parameters: Any
) -> None:
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
    token = _building.set(engine)
    try:
        original(engine, client, parameters)
    except BaseException:
        del _engines[engine.module]  # so that a second try with a mended config is not refused
        if client is not None and before is not None:
            client.placement = before
        raise
    finally:
        _building.reset(token)
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


def _distribute(original: Callable[..., None], engine: DeepSpeedEngine, model: nn.Module) -> None:
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


def _install() -> None:
    _compat.repair_on_cpu()
    _compat.wrap_engine(_configure, _distribute, functools.partial(refuse_type, ours=TYPES))
    registry.each(_name)


_install()
