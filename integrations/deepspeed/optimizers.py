"""The optimizer classes that DeepSpeed builds by the type in its JSON."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NoReturn

import torch

from spectral_dist.core.named import class_of
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat, poet, tensor_parallel
from spectral_dist.integrations.deepspeed._compat import DeepSpeedEngine
from spectral_dist.integrations.deepspeed.parts import classify_part
from spectral_dist.integrations.deepspeed.tiled_placement import placement_for
from spectral_dist.params.param_groups import split_by_kind
from spectral_dist.params.table import show
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING

BUILDING: ContextVar[DeepSpeedEngine | None] = ContextVar("engine being built", default=None)
"""The engine that DeepSpeed is building in this thread."""


class FromJSON(ShardedOptimizer):
    """The base of optimizers that DeepSpeed builds from its JSON: of bare parameters and options.

    Args:
        params: parameters, (name, parameter) pairs or groups of them, as DeepSpeed passes them on.
        options: the optimizer's own, and ``matrices``, ``scalars`` and ``split`` as
            ``spectral_dist.param_groups`` has them.

    Raises:
        ValueError: not called by DeepSpeed; an unknown or bad option.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        engine = BUILDING.get()
        routing = {name: options.pop(name) for name in ROUTING if name in options}
        if engine is None:
            _refuse_in_code(type(self).__name__)
        self.options_type.from_user(options, type(self).__name__)  # before the table is shown
        whole = tensor_parallel.specs_of(engine.module)
        routes = classify_part(engine, routing) if whole is None else whole
        show(routes)
        groups = split_by_kind(_trainable(params), routes, self.options_type)
        if whole is not None:
            groups = tensor_parallel.with_tiles_apart(groups, engine.autotp_size())
        super().__init__(groups, placement=placement_for(engine), **options)


def _refuse_in_code(name: str) -> NoReturn:
    """Raise a ValueError that says which class to use outside of DeepSpeed's JSON."""
    raise ValueError(
        f"{name} is the optimizer that DeepSpeed builds from its JSON; in code, write"
        f" spectral_dist.{name.removeprefix('Spectral')}(spectral_dist.param_groups(model), ...)"
    )


def _trainable(params: Iterable[Any]) -> list[Any]:
    """Return the parameters, or groups of them, without frozen parameters.

    DeepSpeed passes on all of module.parameters().
    """
    trainable = []
    for item in params:
        if isinstance(item, dict):
            trainable.append({**item, "params": _trainable(item["params"])})
        elif (item[1] if isinstance(item, tuple) else item).requires_grad:
            trainable.append(item)
    return trainable


class SpectralPOET(FromJSON, POET):
    """``spectral_dist.POET`` named in a DeepSpeed JSON, by which the engine converts the model.

    Args:
        params: as DeepSpeed passes them on.
        options: the optimizer's own, and the settings of ``spectral_dist.poet.convert``; no
            ``split``.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        engine = BUILDING.get()
        if engine is None:
            _refuse_in_code(type(self).__name__)
        _, options = poet.split_params(options)
        super().__init__(poet.insert_skew_params(params, engine.module), **options)


TYPES: dict[str, type[ShardedOptimizer]] = {}
"""The optimizer class of each type that the JSON may name."""


def register_type(entry: registry.Entry) -> None:
    """Register an optimizer with DeepSpeed: the class that JSON builds, and that of user code."""
    json_class: type[ShardedOptimizer] = SpectralPOET
    code_class: type[ShardedOptimizer] = POET
    if entry.rule is not None:
        code_class = class_of(entry)
        doc = f"``spectral_dist.{entry.title}`` named in a DeepSpeed JSON."
        namespace = {"__doc__": doc, "__module__": __package__}
        json_class = type(entry.deepspeed_type, (FromJSON, code_class), namespace)
    TYPES[entry.deepspeed_type] = json_class
    setattr(torch.optim, entry.deepspeed_type, json_class)
    _compat.ZERO_SUPPORTED_OPTIMIZERS.extend([code_class, json_class])
