"""The tiny Llama of trainer_runs under transformers' Trainer with DeepSpeed, on CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.integrations.huggingface import SpectralCallback, SpectralFactory
from spectral_dist.monitor import Monitor
from tests.distributed.huggingface import trainer_runs
from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.distributed.huggingface.trainer_settings import Small
from tests.support.quiet import quiet

TYPES = {"muon": "SpectralMuon", "sumo": "SpectralSUMO", "normuon": "SpectralNorMuon"}
VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


@contextmanager
def fresh_deepspeed() -> Iterator[None]:
    """Forget the Accelerators and DeepSpeed configurations of earlier tests, and of this one."""
    _compat.without_compiling()
    with fresh(False):
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            for name in VARIABLES:
                os.environ.pop(name, None)


def config(stage: int, optimizer: str | None = None, **params: Any) -> dict[str, Any]:
    """Return a JSON as people write it for the Trainer.

    Args:
        stage: of ZeRO.
        optimizer: that the JSON names; None: none.
        params: of that optimizer, beside lr, weight_decay and the usual options.
    """
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    if optimizer is not None:
        auto = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "scalar_lr": 0.01}
        params = {**auto, **trainer_runs.OPTIONS[optimizer], **params}
        result["optimizer"] = {"type": TYPES[optimizer], "params": params}
    return result


def trainer_of(
    folder: str,
    json: dict[str, Any],
    factory: str | None,
    callback: SpectralCallback | None,
    zero_init: bool = False,
    model: nn.Module | None = None,
    made_of: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    """Return a Trainer.

    Args:
        folder: of checkpoints.
        json: DeepSpeed's.
        factory: the optimizer that a SpectralFactory is asked for; None: no factory.
        callback: the Trainer's; None: none.
        zero_init: make the model by what transformers puts below ``zero.Init``.
        model: to train; None: ``trainer_runs.model_of``.
        made_of: the Trainer's class.
        changes: of TrainingArguments.
    """
    args = trainer_runs.arguments(folder, "one", deepspeed=json, **changes)
    model = model or trainer_runs.model_of(factory or "muon")
    if zero_init:
        torch.manual_seed(0)
        whole, model = model, AutoModelForCausalLM.from_config(model.config)
        assert all(_compat.is_partitioned(p) for p in model.parameters())
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for to, of in zip(model.parameters(), whole.parameters(), strict=True):
                to.data.copy_(of.data)
    keywords = {"optimizer": factory, "args": args, **trainer_runs.OPTIONS.get(factory or "", {})}
    return made_of(
        model=model, args=args,
        train_dataset=trainer_runs.data(int(os.environ.get("WORLD_SIZE", "1"))),
        optimizer_cls_and_kwargs=(SpectralFactory, keywords) if factory else None,
        callbacks=[callback] if callback else [],
    )  # fmt: skip


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return the whole model's parameters, on every rank."""
    named: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def run(
    folder: str,
    stage: int,
    optimizer: str,
    in_json: bool,
    zero_init: bool = False,
    resume: str | None = None,
    smaller: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A run with a checkpoint on the way, or the rest of one.

    Args:
        folder: of checkpoints.
        stage: of ZeRO.
        optimizer: its name.
        in_json: whether DeepSpeed's JSON names it, or a factory builds it.
        zero_init: as in ``trainer_of``.
        resume: the checkpoint to resume from.
        smaller: let ``auto_find_batch_size`` find the usual batch size, from one row more.
        changes: of TrainingArguments, or ``model``.
    """
    if smaller:
        changes["auto_find_batch_size"] = True
        changes["per_device_train_batch_size"] = trainer_runs.BATCH + 1
        changes["made_of"] = Small
    reported: list[int] = []
    monitor = Monitor(every=2, write=[lambda step, report: reported.append(step)])
    with quiet(), fresh_deepspeed():
        trainer = trainer_of(
            folder, config(stage, optimizer if in_json else None), None if in_json else optimizer,
            SpectralCallback(monitor=monitor), zero_init, **changes,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        engine = trainer.model_wrapped
        result = {
            "losses": trainer_runs.losses(trainer), "weights": weights(engine),
            "class": type(engine.basic_optimizer).__name__, "reported": reported,
            "stage": engine.zero_optimization_stage(),
        }  # fmt: skip
        engine.destroy()
    return result


def refused(
    folder: str, in_json: str | None, factory: str | None, with_callback: bool = True
) -> str:
    """Train, and return the class of the optimizer if nothing was refused."""
    json = config(2, in_json)
    if in_json is None:
        json["optimizer"] = {"type": "SGD", "params": {"lr": "auto"}}  # AdamW is compiled
        json["zero_allow_untested_optimizer"] = True
    with quiet(), fresh_deepspeed():
        callback = SpectralCallback() if with_callback else None
        trainer = trainer_of(folder, json, factory, callback, max_steps=1, save_strategy="no")
        trainer.train()
    return type(trainer.model_wrapped.basic_optimizer).__name__
