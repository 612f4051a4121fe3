"""DeepSpeed: import this once, then name "SpectralMuon" in the JSON; any ZeRO stage.

The import registers every optimizer class in ``torch.optim``, where DeepSpeed looks for types that
it does not know, and wraps four private methods of DeepSpeedEngine:

- the one that builds the optimizer, which sees both the module and the optimizer: that is how
  embeddings and heads are found although nobody has tagged them;
- the one that checks the optimizer's type, to suggest the nearest name for an unknown type;
- the one by which tensor parallelism cuts the model, to recognize its parameters before;
- the one that takes the model in, to convert it for POET before anything else is done to it.

Every private name of DeepSpeed stands in ``_compat``.
"""

from __future__ import annotations

import functools
from typing import Any

from spectral_dist.integrations.deepspeed import _compat, _compat_tiles
from spectral_dist.integrations.deepspeed.config import refuse_type
from spectral_dist.integrations.deepspeed.optimizers import TYPES, SpectralPOET, register_type
from spectral_dist.integrations.deepspeed.patches import configure, distribute
from spectral_dist.integrations.deepspeed.tensor_parallel import partition
from spectral_dist.rules import registry

__all__ = ["SpectralPOET"]


def __getattr__(name: str) -> Any:
    """Return the optimizer class of a JSON type, for example of ``SpectralMuon``."""
    if name in TYPES:
        return TYPES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Wrap the engine, and register every optimizer with DeepSpeed, rules registered later too."""
    _compat.repair_on_cpu()
    _compat.wrap_engine(configure, distribute, functools.partial(refuse_type, ours=TYPES))
    _compat_tiles.wrap_tensor_parallel(functools.partial(partition, ours=TYPES))
    registry.add_listener(register_type)


install()
