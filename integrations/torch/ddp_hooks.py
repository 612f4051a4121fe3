"""What the communication hooks of DistributedDataParallel share: checks, and who owns a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.units import MatrixUnit
from spectral_dist.placement.base import ParamGroup


def replicated_units(
    model: DistributedDataParallel, optimizer: SpectralOptimizer, caller: str
) -> list[tuple[ParamGroup, list[MatrixUnit]]]:
    """Return each group of matrices with its units; a collective call, which creates states.

    Args:
        model: whose every rank holds all of these matrices whole.
        optimizer: of the model's parameters.
        caller: the function that a user has called, for errors.

    Raises:
        ValueError: on every rank, if that is not so, or a parameter is not contiguous.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"{caller}: the model is a {type(model).__name__}, and must be the"
            " DistributedDataParallel itself; shard with that alone, and compile the module in it"
        )
    model_ids = {id(p) for p in model.parameters()}
    groups = []
    optimizer.initialize_state()
    for group in optimizer.param_groups:
        if group["kind"] != "matrix":
            continue
        for route in optimizer.routes[group["id"]]:
            if id(route.parameter) not in model_ids:
                raise ValueError(f"{caller}: {route.name} is not of this model")
            if not route.parameter.is_contiguous():
                raise ValueError(
                    f"{caller}: {route.name} is channels_last; leave the model contiguous, or leave"
                    f" {caller} out"
                )
        units: list[MatrixUnit] = []
        for unit in optimizer.units(group):
            if unit.located.group is not None or unit.located.replicas != model.process_group:
                raise ValueError(
                    f"{caller} is for parameters that every rank of the DistributedDataParallel"
                    " holds whole, and an optimizer built of spectral_dist.param_groups(that model)"
                )
            assert isinstance(unit, MatrixUnit)
            units.append(unit)
        groups.append((group, units))
    return groups


def set_hook(
    model: DistributedDataParallel, state: object, hook: Callable[..., Any], caller: str
) -> None:
    """Set the model's communication hook, of which it can have one.

    Args:
        model: the model.
        state: the first argument of the hook.
        hook: the hook.
        caller: the function that a user has called, for errors.

    Raises:
        ValueError: it has one already.
    """
    try:
        model.register_comm_hook(state, hook)
    except RuntimeError as error:
        if "only be called once" not in str(error):
            raise
        raise ValueError(
            f"{caller}: the model has a communication hook already (project_gradients,"
            " reduce_to_owners, mixed_precision or one of your own), and can have one only; leave"
            " one of them out"
        ) from error
