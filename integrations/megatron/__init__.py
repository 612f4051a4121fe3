"""Megatron-core: ``--optimizer spectral_muon`` in scripts, and a function for code of your own.

For Megatron-LM's scripts it is enough to import this anywhere before ``pretrain`` is called. In
code of your own, write ``OptimizerConfig(optimizer="spectral_muon")`` and call Megatron's
``get_megatron_optimizer``, which the import replaces, or ``get_spectral_megatron_optimizer``, which
takes our options.

Only the torch optimizer inside of Megatron's is ours. Megatron's own are parameter groups and their
schedules, gradient norm and clipping, loss scaling, the distributed optimizer and checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.integrations.megatron import _compat, _compat_hooks
from spectral_dist.integrations.megatron.arguments import add_spectral_args, parsed, restore
from spectral_dist.integrations.megatron.build import build
from spectral_dist.integrations.megatron.foreign import group_objects, refuse_foreign
from spectral_dist.integrations.megatron.optimizer import TYPES
from spectral_dist.rules import registry

__all__ = ["TYPES", "add_spectral_args", "get_spectral_megatron_optimizer"]

_building: ContextVar[bool] = ContextVar("spectral optimizer being built", default=False)
"""Whether ``get_spectral_megatron_optimizer`` is running in this thread."""


@explained
def get_spectral_megatron_optimizer(
    config: Any, model_chunks: Any, config_overrides: Any = None, **options: Any
) -> Any:
    """Build an optimizer as Megatron's ``get_megatron_optimizer`` does, with one of ours inside.

    Args:
        config, model_chunks, config_overrides: as Megatron's function takes them;
            ``config.optimizer`` names ours, for example "spectral_muon". lr, weight_decay,
            adam_beta1, adam_beta2 and adam_eps of ``config`` are options of ours, too.
        options: ``use_gloo_process_groups``, ``pg_collection`` and
            ``dump_param_to_param_group_map`` of Megatron's; the rest are options of
            ``spectral_dist.options`` and of ``param_groups`` (matrices, scalars, split, one_sided),
            beside those that ``add_spectral_args`` has parsed.

    Returns:
        Megatron's optimizer, a ``MegatronOptimizer``.

    Raises:
        ValueError: an unknown optimizer or option, a configuration that is not supported.
    """
    megatron_names = ("use_gloo_process_groups", "pg_collection", "dump_param_to_param_group_map")
    passed = {name: options.pop(name) for name in megatron_names if name in options}
    name, flags = parsed()
    if config.optimizer != "adam":
        name = config.optimizer
    if name not in TYPES:
        raise ValueError(
            f"OptimizerConfig's optimizer is {config.optimizer!r}{suggest(config.optimizer, TYPES)}"
        )
    all_options = {**flags, **options}
    token = _building.set(True)
    try:
        return build(_original, name, all_options, config, model_chunks, config_overrides, **passed)
    finally:
        _building.reset(token)


def _is_ours(config: Any) -> bool:
    """Return whether a config asks for ours: by its name, or by a flag that makes it "adam"."""
    return config.optimizer in TYPES or (parsed()[0] is not None and config.optimizer == "adam")


def _with_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``get_megatron_optimizer``: it builds ours where the config asks for it."""

    @functools.wraps(original)
    @explained
    def get_megatron_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(config.optimizer)
        if _is_ours(config) or name.startswith("spectral"):
            return get_spectral_megatron_optimizer(config, *args, **kwargs)
        _, flags = parsed()
        if flags:
            names = ", ".join("--spectral-" + flag.replace("_", "-") for flag in flags)
            raise ValueError(
                f"{names} would have no effect with --optimizer {name}; write one of"
                f" {', '.join(TYPES)}"
            )
        return _refuse_our_checkpoints(original(config, *args, **kwargs))

    return get_megatron_optimizer


def _refuse_our_checkpoints(built: Any) -> Any:
    """Make an optimizer of Megatron's own refuse to load checkpoints of ours, and return it."""
    load = built.load_state_dict

    @functools.wraps(load)
    @explained
    def load_state_dict(state_dict: Any) -> Any:
        refuse_foreign({"param_groups": [{}]}, state_dict)
        return load(state_dict)

    built.load_state_dict = load_state_dict
    return built


def _guarded(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that ``get_megatron_optimizer`` calls: it refuses to build Adam for ours.

    It would, if a script had imported Megatron's function by name before we replaced it.
    """

    @functools.wraps(inner)
    @explained
    def guarded(config: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(config) and not _building.get():
            raise ValueError(
                f"{parsed()[0] or config.optimizer} was asked for, but this get_megatron_optimizer"
                " was imported before spectral_dist.integrations.megatron, which replaces it: move"
                " that import to the top, or call get_spectral_megatron_optimizer"
            )
        return inner(config, *args, **kwargs)

    return guarded


_original = _compat.replace_builders(_with_ours, _guarded)
registry.add_listener(
    lambda entry: _compat.register(entry.megatron_name, TYPES[entry.megatron_name])
)
_compat_hooks.extend_parser(add_spectral_args)
_compat_hooks.extend_checkpoint_args(restore)
_compat_hooks.guard_loading(refuse_foreign, group_objects)
