"""verl: VERL_USE_EXTERNAL_MODULES=spectral_dist.integrations.verl in its environment, and then

actor_rollout_ref.actor.strategy=fsdp2
actor_rollout_ref.actor.optim.optimizer_impl=spectral_dist
actor_rollout_ref.actor.optim.optimizer=Muon

Every process of verl imports the modules that the variable names. verl has no registry of
optimizers, and no hook of it has the model: one private method of its FSDP engine is wrapped here,
of the version ``KNOWN``, and does what it did for any other ``optimizer_impl``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import verl
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.core.named import class_of
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.after_import import after_import
from spectral_dist.integrations.versions import require
from spectral_dist.params.param_groups import param_groups
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING

KNOWN = "0.9.1"
"""The version that the tests run."""
ENGINE = "verl.workers.engine.fsdp.transformer_impl"
IMPLEMENTATION = "spectral_dist"
"""``optimizer_impl`` of our optimizers."""


def _with_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FSDPEngine's ``_build_optimizer``: it builds ours, of the model, where it is asked."""

    @functools.wraps(original)
    @explained
    def _build_optimizer(self: Any, module: nn.Module) -> Any:
        if self.optimizer_config.optimizer_impl != IMPLEMENTATION:
            return original(self, module)
        return build(module, self.optimizer_config, self.engine_config.strategy)

    return _build_optimizer


def build(module: nn.Module, config: Any, strategy: str) -> ShardedOptimizer:
    """Return the optimizer that a config asks for.

    Args:
        module: the engine's model, sharded already.
        config: verl's FSDPOptimizerConfig. ``optimizer`` is the name of our class; lr, weight_decay
            and betas are options of ours, and ``override_optimizer_config`` has others, and those
            of ``param_groups`` (matrices, scalars, split, one_sided).
        strategy: of the engine, "fsdp2".

    Raises:
        ValueError: an unknown optimizer or option; POET; another strategy.
    """
    if strategy != "fsdp2":
        raise ValueError(
            f"strategy is {strategy!r}: every matrix was flattened to 1-D by FSDP1, which verl uses"
            " then; write strategy=fsdp2 (actor_rollout_ref.actor.strategy=fsdp2,"
            " critic.strategy=fsdp2)"
        )
    by_title = {entry.title: entry for entry in registry.entries()}
    entry = by_title.get(config.optimizer)
    if entry is None:
        raise ValueError(
            f"unknown optimizer {config.optimizer!r}{suggest(str(config.optimizer), by_title)}"
        )
    if entry.rule is None:
        raise ValueError(
            f"spectral optimizers do not support {entry.title} under verl, which sends weights by"
            " their names to the rollout, without the rotations beside them: write optimizer=Muon,"
            " or take another trainer"
        )
    regular = importlib.import_module("verl.utils.py_functional").convert_to_regular_types
    options = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": config.betas,
        **(regular(config.override_optimizer_config) or {}),
    }
    routing = {name: options.pop(name) for name in ROUTING if name in options}
    made_of = class_of(entry)
    made_of.options_type.from_user(options, entry.title)  # before the table is shown
    return made_of(param_groups(module, **routing), **options)


def _wrap(engine: Any) -> None:
    """Wrap the method in the engine's module, once it is imported."""
    engine.FSDPEngine._build_optimizer = _with_model(engine.FSDPEngine._build_optimizer)


require("verl", "verl", verl.__version__, KNOWN)
after_import(ENGINE, _wrap)
