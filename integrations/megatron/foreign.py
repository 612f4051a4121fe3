"""Refusal of checkpoints of another optimizer, on every rank and before anything is loaded.

Our optimizers put an entry ``STATE`` into each of their parameter groups, which Megatron saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spectral_dist._error_help import explained
from spectral_dist.integrations.megatron.optimizer import STATE, TYPES

ADAM = "Megatron's own optimizer"
UNNAMED = "a spectral optimizer"
"""The optimizer of a checkpoint that an older release wrote, without the optimizer's name."""


@explained
def refuse_foreign(current: Any, saved: Any) -> None:
    """Raise if a checkpoint was saved with another optimizer than that of this run.

    Args:
        current: a state dict that has this run's optimizer state anywhere in it.
        saved: the content of the checkpoint, or a part of it.

    Raises:
        ValueError: says which optimizer saved it, and how to go on without its state.
    """
    ours, theirs = saved_by(current), saved_by(saved)
    if ours is None or theirs is None or ours == theirs:
        return
    if UNNAMED in (ours, theirs) and ADAM not in (ours, theirs):
        return
    raise ValueError(
        f"the checkpoint was saved with another optimizer: {theirs}, where this run has {ours},"
        " and neither can take the other's state. Write the one that it was saved with, as"
        " --optimizer or OptimizerConfig(optimizer=...), or start the optimizer anew with"
        " --no-load-optim (or with --finetune, which counts iterations from 0 as well)"
    )


def saved_by(state: Any) -> str | None:
    """Return the optimizer whose parameter groups are in a state dict; None if there are none."""
    names = {_name(group) for groups in _groups(state) for group in groups}
    return max(names, key=lambda name: (name != ADAM, name != UNNAMED)) if names else None


def _name(group: Any) -> str:
    """Return the name of the optimizer that a parameter group is of."""
    shared = group.get(STATE) if isinstance(group, Mapping) else None
    if not shared:
        return ADAM
    cls = shared.get("optimizer", UNNAMED)
    return next((name for name, candidate in TYPES.items() if candidate.__name__ == cls), str(cls))


def group_objects(state: Any) -> dict[str, Any]:
    """Return the sharded objects in a state dict that hold parameter groups, by "0", "1", ...

    The distributed optimizer saves its groups in such objects if the format is bound to one
    parallelism. In other formats they are in the part of the checkpoint that all ranks share.
    """
    objects = [value for value in _walk(state) if _inside(value) is not None]
    holders = [value for value in objects if any(True for _ in _groups(_inside(value)))]
    return {str(index): value for index, value in enumerate(holders)}


def _groups(state: Any) -> Iterator[list[Any]]:
    """Yield every list of parameter groups in a state dict, those in sharded objects included."""
    for value in _walk(state):
        if isinstance(value, Mapping) and isinstance(value.get("param_groups"), list):
            yield value["param_groups"]
        elif (inside := _inside(value)) is not None:
            yield from _groups(inside)


def _walk(state: Any) -> Iterator[Any]:
    """Yield a nested state dict and all values in it, but not those inside of sharded objects."""
    yield state
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _walk(value)
    elif isinstance(state, list):
        for value in state:
            yield from _walk(value)


def _inside(value: Any) -> Any:
    """Return the dict or list that a sharded object holds; None for any other value."""
    data = getattr(value, "data", None)
    return data if isinstance(data, Mapping | list) else None
