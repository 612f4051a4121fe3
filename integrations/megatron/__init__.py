"""Megatron-core: ``--optimizer spectral_muon``, and the call for code that builds its own.

Import it before ``megatron.training`` takes ``get_megatron_optimizer`` by name, and hand
``add_spectral_args`` to ``pretrain(extra_args_provider=...)``::

    from spectral_dist.integrations.megatron import add_spectral_args
    from megatron.training import pretrain

Everything but the torch optimizer in the middle stays Megatron's: parameter groups and their
schedules, gradient norm and clipping, loss scaling, the distributed optimizer, checkpoints.
"""

from __future__ import annotations

import functools
from typing import Any

import megatron.core.optimizer as megatron_optimizer

from spectral_dist.integrations.megatron.arguments import add_spectral_args, parsed
from spectral_dist.integrations.megatron.build import build
from spectral_dist.integrations.megatron.inner import TYPES
from spectral_dist.options import suggest

__all__ = ["TYPES", "add_spectral_args", "get_spectral_megatron_optimizer"]

_original = megatron_optimizer.get_megatron_optimizer


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
    name = config.optimizer if config.optimizer in TYPES else name
    if name is None:
        raise ValueError(
            f"OptimizerConfig's optimizer is {config.optimizer!r}{suggest(config.optimizer, TYPES)}"
        )
    return build(
        _original, name, {**flags, **options}, config, model_chunks, config_overrides, **passed
    )


@functools.wraps(_original)
def _get_megatron_optimizer(config: Any, *args: Any, **kwargs: Any) -> Any:
    if config.optimizer in TYPES or parsed()[0] is not None:
        return get_spectral_megatron_optimizer(config, *args, **kwargs)
    return _original(config, *args, **kwargs)


megatron_optimizer.get_megatron_optimizer = _get_megatron_optimizer
