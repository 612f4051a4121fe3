"""Gradients of an earlier step that ZeRO-3 applies again, to layers that were not used since.

Stage 3 keeps each rank's run of every gradient in a buffer, which the first micro-batch of a step
overwrites, and later ones add to. It never clears it: a parameter without a gradient in the first
micro-batch keeps what it had in the step before, with any optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat


def warn_of_stale_gradients(engine: Any, optimizer: ShardedOptimizer) -> None:
    """Make this engine warn, once for each parameter, of a gradient that is applied again.

    The host knows which parameters a backward pass has reached, so nothing waits for the device.

    Args:
        engine: built with the optimizer; nothing is done unless it is at stage 3.
        optimizer: the one that the engine steps.
    """
    if engine.zero_optimization_stage() != 3:
        return
    overwritten: set[int] = set()
    filled: set[int] = set()
    warned: set[str] = set()

    def note(parameter: Tensor) -> None:
        """Note that a backward pass has reached a parameter."""
        filled.add(id(parameter))
        if _compat.is_first_micro_batch(engine):
            overwritten.add(id(parameter))

    def step(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        for route in optimizer.all_routes:
            stale = id(route.parameter) in filled - overwritten
            if stale and route.name not in warned:
                warned.add(route.name)
                warnings.warn(
                    f"{route.name} had no gradient in the first micro-batch of this step, so ZeRO-3"
                    " applies that of an earlier step again, as it does with any optimizer. Use"
                    " every layer in each step (add 0 * layer(x).sum() to the loss), or stage 2",
                    stacklevel=2,
                )
        overwritten.clear()
        original(*args, **kwargs)

    for route in optimizer.all_routes:
        route.parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    _compat.wrap_step(engine, step)
