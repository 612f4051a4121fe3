"""Checkpoints of another optimizer: refused on every rank, before any of it is taken.

Ours leaves ``STATE`` in each of its groups, whatever Megatron makes of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spectral_dist.integrations.megatron.optimizer import STATE, TYPES

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
        f"the checkpoint was saved with another optimizer: {before}, where this run has {now}, and"
        " neither can take the other's state. Write the one that it was saved with, as --optimizer"
        " or OptimizerConfig(optimizer=...), or start the optimizer anew with --no-load-optim (or"
        " with --finetune, which counts iterations from 0 as well)"
    )


def saved_by(state: Any) -> str | None:
    """Return the optimizer that a state dict is of; None if it has none."""
    names = {_name(group) for groups in _groups(state) for group in groups}
    return max(names, key=lambda name: (name != ADAM, name != UNNAMED)) if names else None


def _name(group: Any) -> str:
    shared = group.get(STATE) if isinstance(group, Mapping) else None
    if not shared:
        return ADAM
    cls = shared.get("optimizer", UNNAMED)
    return next((name for name, known in TYPES.items() if known.__name__ == cls), str(cls))


def group_objects(state: Any) -> dict[str, Any]:
    """Return the objects of a sharded state dict that have parameter groups in them, by a number.

    The distributed optimizer keeps its groups so in formats that are of one parallelism; in the
    others they are in what all ranks have in common.
    """
    objects = [found for found in _walk(state) if _inside(found) is not None]
    holding = [found for found in objects if any(True for _ in _groups(_inside(found)))]
    return {str(number): found for number, found in enumerate(holding)}


def _groups(state: Any) -> Iterator[list[Any]]:
    """Yield the lists of parameter groups anywhere in a state dict, sharded or not."""
    for value in _walk(state):
        if isinstance(value, Mapping) and isinstance(value.get("param_groups"), list):
            yield value["param_groups"]
        elif (inside := _inside(value)) is not None:
            yield from _groups(inside)


def _walk(state: Any) -> Iterator[Any]:
    """Yield a nested state dict and all that is in it, but for what is in sharded objects."""
    yield state
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _walk(value)
    elif isinstance(state, list):
        for value in state:
            yield from _walk(value)


def _inside(value: Any) -> Any:
    """Return the dict or list that a sharded object holds; None for all else."""
    data = getattr(value, "data", None)
    return data if isinstance(data, Mapping | list) else None
