"""Megatron-core: ``--optimizer spectral_muon``, and the call for code that builds its own.

Importing this is enough for Megatron-LM's scripts: anywhere before ``pretrain`` is called. In code
of your own, write ``OptimizerConfig(optimizer="spectral_muon")`` and call Megatron's
``get_megatron_optimizer``, which importing this replaces, or ``get_spectral_megatron_optimizer``,
which takes our options.

Everything but the torch optimizer in the middle stays Megatron's: parameter groups and their
schedules, gradient norm and clipping, loss scaling, the distributed optimizer, checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from spectral_dist._errors import suggest
from spectral_dist.integrations.megatron import _compat, _compat_hooks
from spectral_dist.integrations.megatron.arguments import add_spectral_args, parsed, restore
from spectral_dist.integrations.megatron.build import build
from spectral_dist.integrations.megatron.foreign import group_objects, refuse_foreign
from spectral_dist.integrations.megatron.optimizer import TYPES
from spectral_dist.rules import registry

__all__ = ["TYPES", "add_spectral_args", "get_spectral_megatron_optimizer"]

_building: ContextVar[bool] = ContextVar("spectral optimizer being built", default=False)


def get_spectral_megatron_optimizer(
    config: Any, model_chunks: Any, config_overrides: Any = None, **options: Any
) -> Any:
    """As Megatron's ``get_megatron_optimizer``, for ``OptimizerConfig(optimizer="spectral_muon")``.

    Args:
        config, model_chunks, config_overrides: as Megatron's. lr, weight_decay, adam_beta1,
            adam_beta2 and adam_eps of ``config`` are ours as well.
        options: ``use_gloo_process_groups``, ``pg_collection`` and
            ``dump_param_to_param_group_map`` of Megatron's; the rest are options of
            ``spectral_dist.options`` and of ``param_groups`` (matrices, scalars, split, one_sided),
            beside those that ``add_spectral_args`` has parsed.

    Raises:
        ValueError: an unknown optimizer or option, a configuration that is not supported.
    """
    theirs = ("use_gloo_process_groups", "pg_collection", "dump_param_to_param_group_map")
    passed = {name: options.pop(name) for name in theirs if name in options}
    name, flags = parsed()
    if config.optimizer != "adam":
        name = config.optimizer
    if name not in TYPES:
        raise ValueError(
            f"OptimizerConfig's optimizer is {config.optimizer!r}{suggest(config.optimizer, TYPES)}"
        )
    given = {**flags, **options}
    token = _building.set(True)
    try:
        return build(_original, name, given, config, model_chunks, config_overrides, **passed)
    finally:
        _building.reset(token)


def _is_ours(config: Any) -> bool:
    """Whether our optimizer is asked for: by its name, or by a flag that Megatron reads as Adam."""
    return config.optimizer in TYPES or (parsed()[0] is not None and config.optimizer == "adam")


def _taking_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's ``get_megatron_optimizer``, which gives ours where it is asked for."""

    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(config.optimizer)
        if _is_ours(config) or name.startswith("spectral"):
            return get_spectral_megatron_optimizer(config, *args, **kwargs)
        _, flags = parsed()
        if flags:
            said = ", ".join("--spectral-" + flag.replace("_", "-") for flag in flags)
            raise ValueError(
                f"{said} would have no effect with --optimizer {name}; write one of"
                f" {', '.join(TYPES)}"
            )
        return _refusing(original(config, *args, **kwargs))

    return get_megatron_optimizer


def _refusing(built: Any) -> Any:
    """An optimizer of Megatron's own, which takes no checkpoint of ours."""
    load = built.load_state_dict

    @functools.wraps(load)
    def load_state_dict(state_dict: Any) -> Any:
        refuse_foreign({"param_groups": [{}]}, state_dict)
        return load(state_dict)

    built.load_state_dict = load_state_dict
    return built


def _guarded(inner: Callable[..., Any]) -> Callable[..., Any]:
    """What Megatron's function calls; reached by another way than ours, it would build Adam."""

    @functools.wraps(inner)
    def guarded(config: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(config) and not _building.get():
            raise ValueError(
                f"{parsed()[0] or config.optimizer} was asked for, but this get_megatron_optimizer"
                " was imported before spectral_dist.integrations.megatron, which replaces it: move"
                " that import to the top, or call get_spectral_megatron_optimizer"
            )
        return inner(config, *args, **kwargs)

    return guarded


_original = _compat.replace_builders(_taking_ours, _guarded)
registry.add_listener(
    lambda entry: _compat.register(entry.megatron_name, TYPES[entry.megatron_name])
)
_compat_hooks.extend_parser(add_spectral_args)
_compat_hooks.extend_checkpoint_args(restore)
_compat_hooks.guard_loading(refuse_foreign, group_objects)
