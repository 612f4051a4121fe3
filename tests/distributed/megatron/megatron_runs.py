"""Megatron runs with our optimizers, on a rank; what the tests compare comes back as plain data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_dist.core.units import MatrixUnit
from tests.support import megatron_cpu
from tests.support import megatron_model as models

DISTRIBUTED = {"use_distributed_optimizer": True}


def build(
    version: str,
    name: str,
    groups: dict[str, Any] | None = None,
    wrapping: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[int, int], Any, Any]:
    """(data rank, ranks), the wrapped model, Megatron's optimizer. ``options`` are ours.

    With virtual pipeline stages the wrapped model is a list of this rank's parts.
    """
    megatron_cpu.install(version)
    from spectral_dist.integrations.megatron import TYPES, get_spectral_megatron_optimizer

    data = models.parallel(**(groups or {}))
    stages = (groups or {}).get("virtual_pipeline_model_parallel_size") or 1
    chunks = [
        models.wrap(models.gpt(vp_stage=s if stages > 1 else None, **(model or {})),
                    **(wrapping or {}))
        for s in range(stages)
    ]  # fmt: skip
    ddp = chunks if stages > 1 else chunks[0]
    settings = models.optimizer_config(ddp, optimizer=name, **{"adam_eps": 1e-4, **(config or {})})
    if name in TYPES:
        return data, ddp, get_spectral_megatron_optimizer(settings, chunks, **(options or {}))
    from megatron.core.optimizer import get_megatron_optimizer

    return data, ddp, get_megatron_optimizer(settings, chunks)


def inner(optimizer: Any) -> list[Any]:
    """Our optimizers inside Megatron's."""
    return [leaf.optimizer for leaf in optimizer.chained_optimizers]


def train(*args: Any, steps: int = 5, **kwargs: Any) -> dict[str, Any]:
    """Losses, gradient norms, parameters after the steps, and counts of this rank."""
    data, ddp, optimizer = build(*args, **kwargs)
    found = [models.train_step(ddp, optimizer, models.batch(s, *data)) for s in range(steps)]
    return {
        "losses": [loss for loss, _ in found],
        "norms": [norm for _, norm in found],
        "parameters": models.full_parameters(ddp),
        **counts(optimizer),
    }


def counts(optimizer: Any) -> dict[str, Any]:
    """Matrices orthogonalized, bytes sent, elements of momentum, and so on, of this rank."""
    ours = [o for o in inner(optimizer) if hasattr(o, "polar_calls")]
    momenta = [
        o.state[p]["exp_avg"].numel() if "exp_avg" in o.state[p] else 0
        for o in ours
        for group in o.param_groups
        if group["kind"] == "matrix"
        for p in group["params"]
    ]
    return {
        "polar_calls": sum(o.polar_calls for o in ours),
        "bytes": sum(o.comm_bytes for o in ours),
        "all_to_alls": sum(o.meter.calls.get("all_to_all", 0) for o in ours),
        "strategies": {
            strategy
            for o in ours
            for unit in o.all_units
            if isinstance(unit, MatrixUnit)
            for strategy in unit.plan.strategies
        },
        "momentum": sum(momenta),
        "matrix_state": sum(
            p.values.numel() for o in ours for p in o.matrix_parts() if p.is_primary and p.shape
        ),
    }


def gradients(version: str, name: str, **kwargs: Any) -> dict[str, Any]:
    """One step of one process: parameters before and after it, and the gradients it was given."""
    data, ddp, optimizer = build(version, name, **kwargs)
    before = models.full_parameters(ddp)
    seen: dict[str, Tensor] = {}
    step = optimizer.step

    def look() -> Any:
        for key, parameter in models.named_parameters(ddp):
            seen[key] = parameter.main_grad.clone()
        return step()

    optimizer.step = look
    models.train_step(ddp, optimizer, models.batch(0, *data))
    return {"before": before, "after": models.full_parameters(ddp), "gradients": seen}


def content(ddp: Any, optimizer: Any, loading: bool, sharding: str | None) -> dict[str, Any]:
    """What Megatron's checkpoints hold."""
    chunks = models.chunks_of(ddp)
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    held = {
        name: models.gpt_of(chunk).sharded_state_dict()
        for name, chunk in zip(names, chunks, strict=True)
    }
    extra: dict[str, Any] = {}
    if sharding is not None:
        extra["metadata"] = {"distrib_optim_sharding_type": sharding}
    whole = held["model"] if len(chunks) == 1 else held
    state = optimizer.sharded_state_dict(whole, is_loading=loading, **extra)
    return {**held, "optimizer": state}


def restore(ddp: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """What ``content`` has loaded goes into the model and the optimizer."""
    chunks = models.chunks_of(ddp)
    for i, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{i}"
        models.gpt_of(chunk).load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])


def save(folder: str, *args: Any, sharding: str | None = None, **kwargs: Any) -> list[float]:
    """Three steps, a checkpoint, three more; the losses of these."""
    data, ddp, optimizer = build(*args, **kwargs)
    from megatron.core import dist_checkpointing

    for s in range(3):
        models.train_step(ddp, optimizer, models.batch(s, *data))
    dist.barrier()
    dist_checkpointing.save(content(ddp, optimizer, False, sharding), folder)
    return [models.train_step(ddp, optimizer, models.batch(s, *data))[0] for s in range(3, 6)]


def load(folder: str, *args: Any, sharding: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """The checkpoint, and three steps from there: their losses, and what was restored."""
    data, ddp, optimizer = build(*args, **kwargs)
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(content(ddp, optimizer, True, sharding), folder)
    restore(ddp, optimizer, state)
    restored = inner(optimizer)[0]
    tables = [group.get("coefficients") for group in restored.param_groups]
    losses = [models.train_step(ddp, optimizer, models.batch(s, *data))[0] for s in range(3, 6)]
    keys = sorted({key for state in restored.state.values() for key in state})
    return {
        "losses": losses,
        "steps": restored.num_steps - 3,
        "coefficients": [table for table in tables if table],
        "keys": keys,
        "matrix keys": sorted(
            {
                key
                for o in inner(optimizer)
                for group in o.param_groups
                if group["kind"] == "matrix"
                for p in group["params"]
                for key in o.state[p]
            }
        ),
    }


def error(*args: Any, **kwargs: Any) -> str:
    """The text of the ValueError that building raises."""
    try:
        build(*args, **kwargs)
    except ValueError as found:
        return str(found)
    return "nothing was raised"


def table(version: str, **kwargs: Any) -> list[tuple[str, str, list[tuple[str, tuple[int, int]]]]]:
    """(name, kind, matrices) of every parameter of this rank's optimizers."""
    _, _, optimizer = build(version, "spectral_muon", **kwargs)
    return [
        (route.name, route.kind, [(m.name, m.shape) for m in route.matrices])
        for found in inner(optimizer)
        for route in found.all_routes
    ]


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether all parameters are equal bit by bit."""
    return all(torch.equal(found[name], wanted[name]) for name in wanted)
