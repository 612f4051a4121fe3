"""Check that a checkpoint is of this model and this optimizer, by its keys, shapes and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectral_dist.checkpoint.names import STATE, named
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.params.spec import plain_name

NOT_OPTIONS = ("rule", "names")
"""Keys of a saved group that are no options."""


def check_rule(where: str, saved: str | None, optimizer: ShardedOptimizer) -> None:
    """Check that a checkpoint was saved by an optimizer of the same rule.

    Args:
        where: the checkpoint, for the error.
        saved: the rule's name in it; None if it has none, which is accepted.
        optimizer: that is to be loaded.

    Raises:
        ValueError: it is another rule's.
    """
    rule_name = optimizer.rule_name
    if saved is not None and saved != rule_name:
        raise ValueError(
            f"{where} was saved with another optimizer: {saved}, and this one is {rule_name}, which"
            f" means other things by its states and options; load it with {saved}, or load only the"
            f" weights of it and begin anew with {rule_name}"
        )


def check_entries(
    folder: str | Path,
    model: nn.Module,
    model_state: Mapping[str, Any],
    state: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, Any],
) -> None:
    """Check that a checkpoint has the entries of a model and its optimizer, and no others.

    Args:
        folder: of the checkpoint.
        model: as the user has it.
        model_state: its state, by name.
        state: the optimizer's, by parameter.
        saved: the checkpoint's metadata by key.

    Raises:
        ValueError: names the first entry.
    """
    for name, entry in state.items():
        for key in entry:
            if f"optimizer.state.{name}.{key}" not in saved:
                raise ValueError(
                    f"{folder} has no {key} of {name}; it was saved of another model, or with that"
                    " parameter on the other of the rule and AdamW (matrices, scalars)"
                )
    for name, tensor in model_state.items():
        metadata = saved.get(f"model.{name}")
        if metadata is None and not any(key.startswith(f"model.{name}.") for key in saved):
            raise ValueError(f"{folder} has no {name}, which is here: it is of another model")
        size = getattr(metadata, "size", None)
        if isinstance(tensor, Tensor) and size != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} here, but {tuple(size or ())} in {folder}: it was"
                " saved of another model"
            )
    # torch.distributed.checkpoint flattens dicts, which modules may have as extra state
    nested = tuple(f"{name}." for name, v in model_state.items() if not isinstance(v, Tensor))
    prefix = "model."
    for name in (key[len(prefix) :] for key in saved if key.startswith(prefix)):
        if name not in model_state and not name.startswith(nested):
            raise ValueError(f"{folder} has {name}, which is not here: it is of another model")
    _check_states(folder, model, state, saved)


def _check_states(
    folder: str | Path, model: nn.Module, state: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raise a ValueError for states in a checkpoint of parameters that the optimizer has not.

    Arguments are as in ``check_entries``.
    """
    parameters = named(model)
    # states of parameters that are frozen now are ignored
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    for key in (key[len(STATE) :] for key in saved if key.startswith(STATE)):
        name = key.rpartition(".")[0]
        if name in state or plain_name(name) in frozen:
            continue
        name = plain_name(name)
        if name not in parameters:
            raise ValueError(f"{folder} has {name}, which is not here: it is of another model")
        tied = [n for n, p in parameters.items() if p is parameters[name] and n in state]
        if not tied:
            raise ValueError(
                f"{folder} has a state of {name}, which this optimizer does not train; build it"
                " with all parameters that were trained, or freeze it"
            )
        raise ValueError(
            f"{folder} has {name} and {tied[0]} apart, and here they are tied: it is of another"
            " model; tie them as they were then"
        )


def check_groups(
    optimizer: ShardedOptimizer, names: Mapping[str, str], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Check that the checkpoint's groups divide parameters as the optimizer's groups do.

    Args:
        optimizer: whose groups are compared.
        names: of its parameters in the checkpoint.
        saved: groups, as ``state_dict`` has them.

    Raises:
        ValueError: a parameter that is of another kind now, or groups that were divided otherwise.
    """
    by_name = _by_name(saved)
    for group in optimizer.param_groups:
        param_names = [names[route.name] for route in optimizer.routes[group["id"]]]
        for name in param_names:
            old, first = by_name.get(name), by_name.get(param_names[0])
            if old is None or old["kind"] != group["kind"]:
                was = "not in it" if old is None else f"of kind {old['kind']!r}"
                raise ValueError(
                    f"{name} is of kind {group['kind']!r} here, but {was} in the checkpoint;"
                    " build the optimizer with the matrices, scalars, split and heads that it was"
                    " saved with"
                )
            if old != first:
                raise ValueError(
                    f"{name} and {param_names[0]} are in one parameter group here, but in two"
                    " with different options in the checkpoint; build the groups as they were"
                )


def take_groups(
    optimizer: ShardedOptimizer, names: Mapping[str, str], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Set the options of an optimizer's groups from saved ones that ``check_groups`` has checked.

    Arguments are as in ``check_groups``.
    """
    by_name = _by_name(saved)
    for group in optimizer.param_groups:
        routes = optimizer.routes[group["id"]]
        if routes:
            old = by_name[names[routes[0].name]]
            options = {k: tuple(v) if k == "betas" else v for k, v in old.items()}
            optimizer.fill_in(options, group)
            group.update(options)


def _by_name(saved: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the options of its group for every parameter's name."""
    by_name = {}
    for group in saved:
        options = {key: value for key, value in group.items() if key not in NOT_OPTIONS}
        by_name.update(dict.fromkeys(group["names"], options))
    return by_name
