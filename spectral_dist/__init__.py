"""Orthogonalized optimizers for large-scale training, exact under every way a model is sharded."""

from typing import Any

from spectral_dist import calibrate, checkpoint, estimate, monitor, optimizers, poet
from spectral_dist._version import __version__
from spectral_dist.estimate.deepspeed_names import (
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from spectral_dist.optimizers import *  # noqa: F403  whatever rules there are
from spectral_dist.params.param_groups import param_groups, tag
from spectral_dist.poet.optimizer import POET

__all__ = [
    "POET",
    "__version__",
    "calibrate",
    "checkpoint",
    "estimate",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "monitor",
    "param_groups",
    "poet",
    "tag",
]
__all__ += optimizers.__all__


def __getattr__(name: str) -> Any:
    """Return the optimizer of a rule that was registered later."""
    try:
        return getattr(optimizers, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
