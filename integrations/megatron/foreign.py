"""Checkpoints of another optimizer: refused on every rank, before any of it is taken.

Ours leaves ``STATE`` in each of its groups, whatever Megatron makes of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spectral_dist.integrations.megatron.inner import STATE

ADAM = "Megatron's own optimizer"
UNNAMED = "a spectral optimizer"
"""Whose checkpoint is of a release that did not say which one it was."""


def refuse_foreign(wanted: Any, saved: Any) -> None:
    """Raise if a checkpoint's optimizer is not the one that it is to be loaded into.

    Args:
        wanted: a state dict of the optimizer that there is (in any part of it).
        saved: what is in the checkpoint, or some of it.

    Raises:
        ValueError: says which of them it was, and how to go on without.
    """
    now, before = saved_by(wanted), saved_by(saved)
    if now is None or before is None or now == before:
        return
    if UNNAMED in (now, before) and ADAM not in (now, before):
        return
    raise ValueError(
        f"the checkpoint's optimizer is {before}, but this run's is {now}, and neither can take the"
        " other's state: go on with the one that it was saved with, as --optimizer or"
        " OptimizerConfig(optimizer=...) says, or start the optimizer anew with --no-load-optim (or"
        " --finetune, which counts iterations from 0 as well)"
    )


def saved_by(state: Any) -> str | None:
    """Return the optimizer that a state dict is of; None if it has none."""
    names = {_name(group) for groups in _groups(state) for group in groups}
    return max(names, key=lambda name: (name != ADAM, name != UNNAMED)) if names else None


def _name(group: Any) -> str:
    shared = group.get(STATE) if isinstance(group, Mapping) else None
    return shared.get("optimizer", UNNAMED) if shared else ADAM


def _groups(state: Any) -> Iterator[list[Any]]:
    """Yield the lists of parameter groups anywhere in a state dict, sharded or not."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key == "param_groups" and isinstance(value, list):
                yield value
            else:
                yield from _groups(value)
    elif isinstance(state, list):
        for value in state:
            yield from _groups(value)
    elif isinstance(getattr(state, "data", None), Mapping | list):  # a ShardedObject
        yield from _groups(state.data)
