"""trainer_runs' model under Lightning's DeepSpeedStrategy, which takes a CPU for a GPU here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies import deepspeed as of_lightning
from torch import nn

import spectral_dist
from spectral_dist.integrations.deepspeed import _compat
from tests.distributed.lightning import trainer_runs


@contextmanager
def cpu_for_gpu() -> Iterator[None]:
    """Let the strategy take a CPU: it asks for a CUDA device and for that device's number."""
    _compat.without_compiling()
    with (
        mock.patch.object(of_lightning, "CUDAAccelerator", CPUAccelerator),
        mock.patch.object(of_lightning, "_validate_device_index_selection"),
    ):
        yield


def config(stage: int, name: str | None) -> dict[str, Any]:
    """Return a JSON as people write it for Lightning; with a name it has that optimizer."""
    content: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if name is not None:
        params = {"lr": trainer_runs.LR, "weight_decay": 0.1, "scalar_lr": 0.01}
        params |= trainer_runs.OPTIONS[name]
        if name == "POET":
            params["block"] = trainer_runs.BLOCK
        content["optimizer"] = {"type": f"Spectral{name}", "params": params}
    return content


def net_of(name: str, in_json: bool) -> nn.Module:
    """Return the model as the user has it: in float32, and POET's converted unless JSON does it."""
    net = trainer_runs.Net()
    if name == "POET" and not in_json:
        spectral_dist.poet.convert(net, block=trainer_runs.BLOCK)
    return net


def by_loop(name: str, in_json: bool) -> dict[str, Any]:
    """Return the weights of one process, with Lightning's scheduler if JSON has no optimizer.

    Lightning divides the loss by the number of batches that it accumulates, and DeepSpeed does so
    again: gradients are that many times smaller than under Lightning's other strategies.
    """
    net = net_of(name, in_json)
    if name == "POET" and in_json:  # named as in Lit: permutations follow from layers' names
        spectral_dist.poet.convert(nn.ModuleDict({"net": net}), block=trainer_runs.BLOCK)
    result = trainer_runs.by_loop(
        name, net=net, scheduled=not in_json, divided=trainer_runs.ACCUMULATION
    )
    return {key: result["weights"][key] for key, _ in net.named_parameters()}


def run(
    folder: str, stage: int, name: str, in_json: bool, resume: str | None = None
) -> dict[str, Any]:
    """A run that saves after each epoch, or the rest of one.

    Args:
        folder: of checkpoints.
        stage: of ZeRO.
        name: of the optimizer.
        in_json: whether DeepSpeed's JSON names it, or ``configure_optimizers`` makes it.
        resume: the checkpoint that the rest goes on from.
    """
    with cpu_for_gpu():
        strategy = DeepSpeedStrategy(
            config=config(stage, name if in_json else None),
            # without numbers DeepSpeed cannot start: it asks for that of its device
            parallel_devices=[torch.device("cpu", rank) for rank in range(dist.get_world_size())],
        )
        trainer = trainer_runs.fit(
            folder, "deepspeed", name, resume, net=net_of(name, in_json), strategy=strategy,
            gradient_clip_val=trainer_runs.CLIP / trainer_runs.ACCUMULATION,
        )  # fmt: skip
        return result(trainer)


def result(trainer: lightning.Trainer) -> dict[str, Any]:
    """Return the whole model's weights, the losses, and what DeepSpeed trained with."""
    engine: Any = trainer.strategy.model
    net = trainer.lightning_module.net
    named = dict(net.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        weights = {name: p.detach().clone() for name, p in named.items()}
    outcome = {
        "weights": weights, "losses": trainer.lightning_module.losses,
        "class": type(engine.basic_optimizer).__name__, "stage": engine.zero_optimization_stage(),
    }  # fmt: skip
    engine.destroy()
    return outcome
