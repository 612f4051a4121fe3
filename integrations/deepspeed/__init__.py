"""DeepSpeed: import this once, then name "SpectralMuon" in the JSON; any ZeRO stage.

It registers the class where DeepSpeed looks for optimizers it does not know (``torch.optim``), and
wraps a private method of the engine, which sees both the module and the optimizer: that is how
embeddings and heads are found with nothing tagged. A second one is wrapped to say what an unknown
type may have meant, and a third to convert the model for POET before anything else is done to it.
All of them stand in ``_compat``, as every private name of DeepSpeed does.
"""

from __future__ import annotations

import functools
from typing import Any

from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.deepspeed.config import refuse_type
from spectral_dist.integrations.deepspeed.optimizers import TYPES, SpectralPOET, make_known
from spectral_dist.integrations.deepspeed.patches import configure, distribute
from spectral_dist.rules import registry

__all__ = ["SpectralPOET"]


def __getattr__(name: str) -> Any:
    """Return the class of a type, as ``SpectralMuon``."""
    if name in TYPES:
        return TYPES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Make every optimizer known to DeepSpeed, now and when a rule is registered later."""
    _compat.repair_on_cpu()
    _compat.wrap_engine(configure, distribute, functools.partial(refuse_type, ours=TYPES))
    registry.add_listener(make_known)


install()
