"""A tiny Llama under transformers' Trainer, and the same training in a loop of our own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import set_seed

import spectral_dist
from spectral_dist.integrations.huggingface import SpectralCallback, SpectralFactory
from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support.quiet import quiet

STEPS, SAVED_AT, ACCUMULATION, BATCH, LENGTH = 6, 3, 2, 2, 8
LR, DECAY, CLIP, WARMUP = 0.02, 0.1, 0.5, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"polar": "jordan", "polar_dtype": "float32"},
    "sumo": {"rank": 4, "period": 2},
    "normuon": {"polar_dtype": "float32"},
    "poet": {"merge_every": 2},
}


def model_of(optimizer: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if optimizer == "poet":
        model = model.double()  # its AdamW divides by gradients that are nearly null
        spectral_dist.poet.convert(model, block=4)
    return model


def data(ranks: int) -> list[dict[str, list[int]]]:
    """Return as many sequences as all ranks take in all steps, and no more."""
    generator = torch.Generator().manual_seed(1)
    count = STEPS * ACCUMULATION * BATCH * ranks
    rows = torch.randint(48, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(
    folder: str, layout: str, made_of: type[TrainingArguments] = TrainingArguments, **changes: Any
) -> TrainingArguments:
    fsdp: dict[str, Any] = {}
    if layout.startswith("fsdp"):
        kind = "SHARDED_STATE_DICT" if layout == "fsdp" else "FULL_STATE_DICT"
        wraps = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}
        fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2, **wraps}}
    usual: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "ddp_backend": "gloo", "report_to": [],
        "disable_tqdm": True, "per_device_train_batch_size": BATCH, "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATION, "learning_rate": LR, "weight_decay": DECAY,
        "max_grad_norm": CLIP, "lr_scheduler_type": "cosine", "warmup_steps": WARMUP,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_steps": SAVED_AT,
        "adam_beta2": 0.95, "optim_args": "scalar_lr=0.01", "seed": 3,
    }  # fmt: skip
    return made_of(**{**usual, **fsdp, **changes})


def trainer_of(
    folder: str,
    layout: str,
    optimizer: str,
    *,
    trainer: type[Trainer] = Trainer,
    model: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    **changes: Any,
) -> Trainer:
    args = arguments(folder, layout, **changes)
    keywords = {"optimizer": optimizer, "args": args, **OPTIONS[optimizer]}
    rows = data(int(os.environ.get("WORLD_SIZE", "1")))
    return trainer(
        model=model or model_of(optimizer), args=args, train_dataset=rows, eval_dataset=rows[:8],
        optimizer_cls_and_kwargs=(SpectralFactory, keywords),
        callbacks=[SpectralCallback()] if callbacks is None else list(callbacks),
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True)
    while hasattr(model, "module"):
        model = model.module
    return {k: v.clone() for k, v in get_model_state_dict(model, options=options).items()}


def check_layout(layout: str, model: nn.Module) -> None:
    """Make sure that a model is sharded, or not, as a test says."""
    assert any(hasattr(p, "placements") for p in model.parameters()) == layout.startswith("fsdp")


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trainer(folder: str, layout: str, optimizer: str, **changes: Any) -> dict[str, Any]:
    """A run with a checkpoint on the way."""
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_of(folder, layout, optimizer, **changes)
        trainer.train()
    check_layout(layout, trainer.model_wrapped)
    return {"losses": losses(trainer), "weights": weights(trainer.model_wrapped)}


def resumed(folder: str, layout: str, optimizer: str) -> dict[str, Any]:
    """The rest of that run, by another Trainer."""
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_of(folder, layout, optimizer, save_strategy="no")
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED_AT}")
    return {"losses": losses(trainer), "weights": weights(trainer.model_wrapped)}


def by_loop(
    ranks: int, optimizer: str, model: nn.Module | None = None, times: int = 1
) -> dict[str, Any]:
    """What the Trainer of so many ranks does, in one process and without any Trainer.

    Args:
        ranks: of the Trainer.
        optimizer: its name.
        model: to train; None: ``model_of(optimizer)``.
        times: how often ``train()`` is called: the schedule and the data begin anew.
    """
    set_seed(3)
    model = model or model_of(optimizer)
    titles = {"muon": "Muon", "sumo": "SUMO", "normuon": "NorMuon", "poet": "POET"}
    with quiet():
        ours = getattr(spectral_dist, titles[optimizer])(
            spectral_dist.param_groups(model), lr=LR, weight_decay=DECAY, betas=(0.9, 0.95),
            scalar_lr=0.01, **OPTIONS[optimizer],
        )  # fmt: skip
    rows = torch.tensor([row["input_ids"] for row in data(ranks)])
    found = []
    for step, batch in enumerate(rows.chunk(STEPS) * times):
        if step % STEPS == 0:
            schedule = get_scheduler("cosine", ours, WARMUP, STEPS)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        with quiet():
            ours.step()
        schedule.step()
        ours.zero_grad()
        found.append(float(loss.detach()))
    return {"losses": found, "weights": weights(model)}
