"""Our optimizers as DeepSpeed's JSON names and builds them."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NoReturn

import torch

from spectral_dist.core.named import class_of
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.deepspeed import poet as rotated
from spectral_dist.integrations.deepspeed._compat import DeepSpeedEngine
from spectral_dist.integrations.deepspeed.placement import ZeroPlacement
from spectral_dist.params.classify import classify
from spectral_dist.params.param_groups import split_by_kind
from spectral_dist.params.table import show
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING

BUILDING: ContextVar[DeepSpeedEngine | None] = ContextVar("engine being built", default=None)
"""The engine that DeepSpeed is building in this thread."""


class FromJSON(ShardedOptimizer):
    """An optimizer as DeepSpeed's JSON builds it: from parameters and plain options.

    Takes ``matrices``, ``scalars`` and ``split`` of ``param_groups`` beside the optimizer's own.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        engine = BUILDING.get()
        routing = {name: options.pop(name) for name in ROUTING if name in options}
        if engine is None:
            _refuse_in_code(type(self).__name__)
        self.options_type.from_user(options, type(self).__name__)  # before the table: it stands out
        routes = classify(engine.module, **routing)
        show(routes)
        groups = split_by_kind(_trainable(params), routes, self.options_type)
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
        engine = BUILDING.get()
        if engine is None:
            _refuse_in_code(type(self).__name__)
        _, options = rotated.divided(options)
        super().__init__(rotated.with_skews(params, engine.module), **options)


TYPES: dict[str, type[ShardedOptimizer]] = {}
"""Our optimizers by the type that the JSON names."""


def make_known(entry: registry.Entry) -> None:
    """Make an optimizer known to DeepSpeed, under its type in the JSON and in code."""
    kind: type[ShardedOptimizer] = SpectralPOET
    in_code: type[ShardedOptimizer] = POET
    if entry.rule is not None:
        in_code = class_of(entry)
        doc = f"``spectral_dist.{entry.title}`` named in a DeepSpeed JSON."
        namespace = {"__doc__": doc, "__module__": __package__}
        kind = type(entry.deepspeed_type, (FromJSON, in_code), namespace)
    TYPES[entry.deepspeed_type] = kind
    setattr(torch.optim, entry.deepspeed_type, kind)
    _compat.ZERO_SUPPORTED_OPTIMIZERS.extend([in_code, kind])
