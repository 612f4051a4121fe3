"""DeepSpeed: import this once, then name "SpectralMuon" in the JSON; any ZeRO stage.

It registers the class where DeepSpeed looks for optimizers it does not know (``torch.optim``), and
wraps a private method, ``DeepSpeedEngine._configure_optimizer``, which sees both the module and the
optimizer: that is how embeddings and heads are found with nothing tagged. A second one,
``_is_supported_optimizer``, is wrapped to say what an unknown type may have meant.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import nn

from spectral_dist import groups as routing
from spectral_dist.integrations.deepspeed.checkpoint import keep_checkpoints
from spectral_dist.integrations.deepspeed.config import refuse, refuse_type
from spectral_dist.integrations.deepspeed.fp16 import scale_loss_at_stage0
from spectral_dist.integrations.deepspeed.matrix_state import keep_matrix_state
from spectral_dist.integrations.deepspeed.placement import ZeroPlacer
from spectral_dist.optimizer import SpectralOptimizer
from spectral_dist.optimizers import ROOT, SUMO, Muon, PolarGrad
from spectral_dist.options import ROUTING

_building: ContextVar[DeepSpeedEngine | None] = ContextVar("engine being built", default=None)
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]]
_engines = weakref.WeakKeyDictionary()


class _FromJSON(SpectralOptimizer):
    """An optimizer as DeepSpeed's JSON builds it: from parameters and plain options.

    Takes ``matrices``, ``scalars`` and ``split`` of ``param_groups`` beside the optimizer's own.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        engine = _building.get()
        given = {name: options.pop(name) for name in ROUTING if name in options}
        if engine is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} is the optimizer that DeepSpeed builds from its JSON; in code, write"
                f" spectral_dist.{name.removeprefix('Spectral')}(spectral_dist.param_groups(model),"
                " ...)"
            )
        self.option_type.from_user(options, type(self).__name__)  # before the table: it stands out
        routes = routing.classify(engine.module, **given)
        routing.show(routes)
        super().__init__(routing.grouped(_trainable(params), routes), **options)
        self.placer = ZeroPlacer(engine)


def _trainable(params: Iterable[Any]) -> list[Any]:
    """Without the frozen ones: DeepSpeed hands over all of module.parameters()."""
    kept = []
    for item in params:
        if isinstance(item, dict):
            kept.append({**item, "params": _trainable(item["params"])})
        elif (item[1] if isinstance(item, tuple) else item).requires_grad:
            kept.append(item)
    return kept


class SpectralMuon(_FromJSON, Muon):
    """``spectral_dist.Muon`` named in a DeepSpeed JSON."""


class SpectralPolarGrad(_FromJSON, PolarGrad):
    """``spectral_dist.PolarGrad`` named in a DeepSpeed JSON."""


class SpectralROOT(_FromJSON, ROOT):
    """``spectral_dist.ROOT`` named in a DeepSpeed JSON."""


class SpectralSUMO(_FromJSON, SUMO):
    """``spectral_dist.SUMO`` named in a DeepSpeed JSON."""


TYPES = {cls.__name__: cls for cls in (SpectralMuon, SpectralPolarGrad, SpectralROOT, SpectralSUMO)}


def _claim(engine: DeepSpeedEngine, client: SpectralOptimizer | None) -> None:
    """One engine a model and an optimizer: a second would flatten parameters already flattened."""
    module = engine.module
    other = _engines.get(module)
    if isinstance(module, DeepSpeedEngine) or (other is not None and other() is not None):
        raise ValueError(
            "this model is already wrapped by a DeepSpeed engine; use that engine, or build the"
            " model anew before a second deepspeed.initialize"
        )
    if client is not None and isinstance(client.placer, ZeroPlacer):
        raise ValueError(
            "this optimizer already belongs to a DeepSpeed engine; build a new one for a second"
        )
    _engines[module] = weakref.ref(engine)


def _configure(
    original: Callable[..., None], engine: DeepSpeedEngine, client: Any, parameters: Any
) -> None:
    if client is not None and not isinstance(client, torch.optim.Optimizer) and callable(client):
        client = client(parameters)  # as DeepSpeed would, to see what it makes
    if not isinstance(client, SpectralOptimizer) and (
        client is not None or engine.optimizer_name() not in TYPES
    ):
        original(engine, client, parameters)
        return
    refuse(engine)
    _claim(engine, client)
    before = client.placer if client is not None else None
    if client is not None:
        client.placer = ZeroPlacer(engine)
    token = _building.set(engine)
    try:
        original(engine, client, parameters)
    except BaseException:
        del _engines[engine.module]  # so that a second try with a mended config is not refused
        if client is not None and before is not None:
            client.placer = before
        raise
    finally:
        _building.reset(token)
    engine.basic_optimizer.placer.start(engine.basic_optimizer)
    keep_checkpoints(engine.basic_optimizer)
    keep_matrix_state(engine, engine.basic_optimizer)
    scale_loss_at_stage0(engine)


def _install() -> None:
    method = DeepSpeedEngine._configure_optimizer
    names = list(inspect.signature(method).parameters)
    if names != ["self", "client_optimizer", "model_parameters"]:
        raise ImportError(
            "this release of spectral_dist works with deepspeed 0.19.8; the installed one builds"
            f" its optimizer from {names}. Install deepspeed==0.19.8"
        )

    @functools.wraps(method)
    def configure(engine: DeepSpeedEngine, client_optimizer: Any, model_parameters: Any) -> None:
        _configure(method, engine, client_optimizer, model_parameters)

    DeepSpeedEngine._configure_optimizer = configure
    supported = DeepSpeedEngine._is_supported_optimizer

    @functools.wraps(supported)
    def is_supported(engine: DeepSpeedEngine, name: str) -> bool:
        refuse_type(name, TYPES)
        return bool(supported(engine, name))

    DeepSpeedEngine._is_supported_optimizer = is_supported
    for name, cls in TYPES.items():
        setattr(torch.optim, name, cls)
    ZERO_SUPPORTED_OPTIMIZERS.extend([Muon, PolarGrad, ROOT, SUMO, *TYPES.values()])


_install()
