"""Runs of transformers' Trainer with settings that change how it goes through a training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainerCallback

from spectral_dist.integrations.huggingface import SpectralCallback
from spectral_dist.monitor import Monitor, Report
from tests.distributed.huggingface import trainer_runs
from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support.quiet import quiet


class Small(Trainer):
    """Has no memory for more than ``trainer_runs.BATCH`` rows, says what torch says."""

    refused: int = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], **others: Any) -> Any:
        if len(inputs["input_ids"]) > trainer_runs.BATCH:
            Small.refused += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().compute_loss(model, inputs, **others)


def smaller(folder: str, layout: str, optimizer: str, **changes: Any) -> dict[str, Any]:
    """``auto_find_batch_size`` from one row more."""
    Small.refused = 0
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_runs.trainer_of(
            folder, layout, optimizer, trainer=Small, auto_find_batch_size=True,
            per_device_train_batch_size=trainer_runs.BATCH + 1, **changes,
        )  # fmt: skip
        trainer.train()
    assert Small.refused == 1
    trainer_runs.check_layout(layout, trainer.model_wrapped)
    weights = trainer_runs.weights(trainer.model_wrapped)
    return {"losses": trainer_runs.losses(trainer), "weights": weights}


def twice(folder: str, layout: str, optimizer: str) -> dict[str, Any]:
    """``train()`` called again: the optimizer's state goes on, data and schedule begin anew."""
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_runs.trainer_of(folder, layout, optimizer, save_strategy="no")
        trainer.train()
        trainer.train()
    return {"weights": trainer_runs.weights(trainer.model_wrapped)}


class Last(TrainerCallback):
    """Keeps the weights of the last step, which load_best_model_at_end replaces."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == state.max_steps:
            self.weights = trainer_runs.weights(self.trainer.model_wrapped)


def best(folder: str, layout: str, optimizer: str) -> dict[str, Any]:
    """Save where an evaluation is the best, which is the first, and load that at the end."""
    last = Last()
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best",
        "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_runs.trainer_of(
            folder, layout, optimizer, callbacks=[SpectralCallback(), last],
            load_best_model_at_end=True, **settings,
        )  # fmt: skip
        last.trainer = trainer
        trainer.train()
        checkpoint = trainer.state.best_model_checkpoint
        at_end = trainer_runs.weights(trainer.model_wrapped)
    assert Path(checkpoint).name == "checkpoint-2"
    with quiet(), fresh(layout.startswith("fsdp")):
        again = trainer_runs.trainer_of(folder, layout, optimizer, save_strategy="no")
        again.train(resume_from_checkpoint=checkpoint)
    file = Path(checkpoint, "model.safetensors")
    return {
        "last": last.weights, "resumed": trainer_runs.weights(again.model_wrapped),
        "at_end": at_end, "saved": load_file(file) if file.exists() else at_end,
    }  # fmt: skip


class Reporter(TrainerCallback):
    """Keeps what is logged, as TensorBoard and W&B would."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **others: Any
    ) -> None:
        self.logs.append({**logs, "step": state.global_step})


class Printer(Reporter, PrinterCallback):
    pass


def monitored(folder: str, layout: str, by_tensorboard: bool) -> dict[str, Any]:
    reports: dict[int, Report] = {}
    before, after, printer = Reporter(), Reporter(), Printer()
    monitor = Monitor(every=2, write=[reports.__setitem__])
    changes: dict[str, Any] = {"save_strategy": "no"}
    if by_tensorboard:
        changes["report_to"] = ["tensorboard"]
        os.environ["TENSORBOARD_LOGGING_DIR"] = folder
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_runs.trainer_of(
            folder, layout, "muon", callbacks=[before, SpectralCallback(monitor)], **changes
        )
        trainer.add_callback(printer)
        trainer.add_callback(after)  # after those that print
        trainer.train()
        trainer.train()
    json.dumps(trainer.state.log_history)
    return {
        "reports": reports, "before": before.logs, "after": after.logs, "printed": printer.logs,
        "history": trainer.state.log_history,
    }  # fmt: skip


def checkpointed(folder: str, layout: str, on: bool) -> dict[str, torch.Tensor]:
    """With activations computed again in the backward pass, or kept."""
    run = trainer_runs.by_trainer(folder, layout, "muon", gradient_checkpointing=on, max_steps=3)
    weights: dict[str, torch.Tensor] = run["weights"]
    return weights
