"""Any registered rule, by name, under real frameworks on a rank: trained, saved and restored.

``module``, if given, is imported first: it registers the rule.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import spectral_dist
from spectral_dist.testing import check_placement
from tests.distributed.deepspeed import engine
from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.torch import layouts
from tests.reference import training
from tests.support import megatron_cpu
from tests.support import megatron_model as models
from tests.support.quiet import quiet

MEGATRON = "0.19.2"
STEPS, SAVED_AFTER = 5, 2
SCALARS: dict[str, Any] = {"scalar_lr": 0.005, "scalar_weight_decay": 0.01}
SMALL = {"layers": 1}
"""Of Megatron's model: enough for every kind of layer."""

Weights = dict[str, Tensor]


def distance(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two models' weights."""
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in others)


def register(module: str) -> None:
    if module:
        importlib.import_module(module)


# -- plain torch


def plain(title: str, options: Mapping[str, Any], layout: str = "one", module: str = "") -> Weights:
    """The rule's class in spectral_dist under a layout; a missing gradient is zeros."""
    register(module)
    placed = layouts.build(layout)
    with quiet():
        optimizer = getattr(spectral_dist, title)(
            spectral_dist.param_groups(placed.model), **SCALARS, **options
        )
        for step in range(STEPS):
            placed.backward(step)
            for p in placed.named.values():
                if p.grad is None and p.requires_grad:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
    return placed.full()


def torch_placement(layout: str) -> int:
    """Check the placement under a layout of plain torch, with its values and after a step."""
    placed = layouts.build(layout)
    with quiet():
        optimizer = spectral_dist.Muon(spectral_dist.param_groups(placed.model), lr=0.02)
        check_placement(optimizer, placed.full())
        placed.backward(0)
        optimizer.step()
        check_placement(optimizer, placed.full())
    return len(optimizer.all_units)


# -- DeepSpeed


def configured(kind: str, options: Mapping[str, Any], stage: int, **changes: Any) -> dict[str, Any]:
    """A JSON that names the rule."""
    if stage == 3:  # several sub-groups
        changes.setdefault("zero", {"sub_group_size": 3000})
    configuration = engine.config(stage, dist.get_world_size(), **changes)
    configuration["optimizer"] = {"type": kind, "params": {**SCALARS, **options}}
    return configuration


def deepspeed_steps(running: Any, first: int, last: int) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for step in range(first, last):
        running.backward(running(layouts.tokens(step).chunk(world)[rank]))
        running.step()


def deepspeed(
    title: str, options: Mapping[str, Any], stage: int, folder: str, module: str = ""
) -> dict[str, float]:
    """How far weights are from one process's, and resumed from a checkpoint from never stopped."""
    alone = plain(title, options, module=module)
    configuration = configured(f"Spectral{title}", options, stage)
    running = engine.engine_for(configuration, model=layouts.conditioned())
    deepspeed_steps(running, 0, SAVED_AFTER)
    running.save_checkpoint(folder, tag="a")
    deepspeed_steps(running, SAVED_AFTER, STEPS)
    weights = engine.full_parameters(running)
    keeps = running.basic_optimizer.keeps_matrix_state
    running.destroy()
    running = engine.engine_for(configuration, model=layouts.conditioned())
    running.load_checkpoint(folder, tag="a")
    deepspeed_steps(running, SAVED_AFTER, STEPS)
    resumed = engine.full_parameters(running)
    running.destroy()
    assert Path(folder, "a", "spectral_dist").exists() == keeps
    initial = layouts.one(layouts.conditioned()).full()
    return {
        "alone": distance(weights, alone),
        "resumed": distance(resumed, weights),
        "moved": distance(weights, initial),
    }


def deepspeed_placement(stage: int) -> int:
    configuration = configured("SpectralMuon", {"lr": 0.02}, stage)
    running = engine.engine_for(configuration, model=layouts.conditioned())
    base = running.basic_optimizer
    check_placement(base, engine.full_parameters(running))
    deepspeed_steps(running, 0, 1)
    check_placement(base, engine.full_parameters(running))
    units = len(base.all_units)
    running.destroy()
    return units


# -- Megatron


def megatron(
    name: str,
    options: Mapping[str, Any],
    groups: Mapping[str, int],
    wrapping: Mapping[str, Any],
    folder: str,
    module: str = "",
    saves: bool = True,
) -> dict[str, Weights]:
    """Weights of a run that saves in the middle, and of one that goes on from there.

    ``saves``: or else take what is in ``folder``, which another layout has saved.
    """
    register(module)
    megatron_cpu.install(MEGATRON)
    from megatron.core import dist_checkpointing

    def built() -> tuple[Any, Any, Callable[[int, int], None]]:
        data, ddp, optimizer = runs.build(
            MEGATRON, name, dict(groups), dict(wrapping), SMALL, options=dict(options)
        )

        def go(first: int, last: int) -> None:
            for step in range(first, last):
                models.train_step(ddp, optimizer, models.batch(step, *data))

        return ddp, optimizer, go

    with quiet():
        ddp, optimizer, go = built()
        initial = models.full_parameters(ddp)
        go(0, SAVED_AFTER)
        if saves:
            dist.barrier()
            dist_checkpointing.save(runs.content(ddp, optimizer, False, None), folder)
        go(SAVED_AFTER, STEPS)
        weights = models.full_parameters(ddp)
        ddp, optimizer, go = built()
        state = dist_checkpointing.load(runs.content(ddp, optimizer, True, None), folder)
        models.gpt_of(ddp).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        go(SAVED_AFTER, STEPS)
    return {"initial": initial, "weights": weights, "resumed": models.full_parameters(ddp)}


def megatron_placement(groups: Mapping[str, int], wrapping: Mapping[str, Any]) -> int:
    data, ddp, optimizer = runs.build(MEGATRON, "spectral_muon", dict(groups), dict(wrapping))
    for inner in runs.inner(optimizer):
        check_placement(inner, models.full_parameters(ddp))
    models.train_step(ddp, optimizer, models.batch(0, *data))
    for inner in runs.inner(optimizer):
        check_placement(inner, models.full_parameters(ddp))
    return sum(len(inner.all_units) for inner in runs.inner(optimizer))


# -- what is refused


def refused(attempt: Callable[[], Any]) -> str:
    """What a ValueError says, or nothing."""
    try:
        with quiet():
            attempt()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def refused_by_torch(title: str, name: str, value: Any, module: str = "") -> list[str]:
    """What is said of a bad option in code, and of one of a parameter group."""
    register(module)
    cls, model = getattr(spectral_dist, title), layouts.conditioned()
    groups = spectral_dist.param_groups(model)
    for group in groups:
        if group["kind"] == "matrix":
            group[name] = value
    return [
        refused(lambda: cls(spectral_dist.param_groups(model), **{name: value})),
        refused(lambda: cls(groups)),
    ]


def refused_by_deepspeed(title: str, name: str, value: Any, module: str = "") -> list[str]:
    """The same of the JSON, and of a parameter group handed to deepspeed.initialize."""
    register(module)
    kind, said = f"Spectral{title}", []
    for options, of_group in (({name: value}, {}), ({}, {name: value})):
        model = layouts.conditioned()
        matrix, rest = [], []
        for key, p in model.named_parameters():
            if p.requires_grad:
                (matrix if training.is_matrix(key) else rest).append(p)
        parameters = [{"params": matrix, **of_group}, {"params": rest}]
        configuration = configured(kind, {"lr": 0.02, **options}, 1)
        said.append(
            refused(
                lambda m=model, c=configuration, p=parameters: engine.engine_for(
                    c, model=m, parameters=p
                )
            )
        )
    return said


def refused_by_megatron(name: str, flag: str, text: str, module: str = "") -> str:
    """What is said of a bad flag, when it is parsed or when the optimizer is built."""
    register(module)
    megatron_cpu.install(MEGATRON)
    from spectral_dist.integrations.megatron import add_spectral_args
    from spectral_dist.integrations.megatron.arguments import forget

    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
    add_spectral_args(parser)
    try:
        parser.parse_args(["--optimizer", name, f"--spectral-{flag.replace('_', '-')}", text])
        return refused(lambda: runs.build(MEGATRON, name, model=SMALL))
    except argparse.ArgumentError as error:
        return str(error)
    finally:
        forget()


def refused_in_a_step(title: str, options: Mapping[str, Any], layout: str, module: str) -> str:
    """What is said when parameters are located."""
    register(module)
    placed = layouts.build(layout)
    with quiet():
        groups = spectral_dist.param_groups(placed.model)
    placed.backward(0)
    return refused(lambda: getattr(spectral_dist, title)(groups, **options).step())
