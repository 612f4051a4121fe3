"""Trainers of TRL on the tiny Llama of trainer_runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from spectral_dist.integrations.huggingface import SpectralCallback, SpectralFactory
from tests.distributed.huggingface import trainer_runs
from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support.quiet import quiet

PLAIN = {"bf16": False, "gradient_checkpointing": False}
"""What TRL's configurations have otherwise."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one whose words are w3, ..., w47."""
    names = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, 48))]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(numbers: list[int]) -> str:
    return " ".join(f"w{max(number, 3)}" for number in numbers)


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def sft(args: dict[str, Any], hook: Any, ranks_of_data: int) -> Trainer:
    rows = [{"input_ids": row["input_ids"]} for row in trainer_runs.data(ranks_of_data)]
    config = trainer_runs.arguments(made_of=SFTConfig, **args, **PLAIN)
    return SFTTrainer(
        trainer_runs.model_of("muon"), config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(), optimizer_cls_and_kwargs=hook(config),
        callbacks=[SpectralCallback()],
    )  # fmt: skip


def pairs(ranks_of_data: int) -> Dataset:
    rows = [row["input_ids"] for row in trainer_runs.data(ranks_of_data)]
    return Dataset.from_list(
        [
            {"prompt": text(r[:3]), "chosen": " " + text(r[3:6]), "rejected": " " + text(r[5:])}
            for r in rows
        ]
    )


def dpo(args: dict[str, Any], hook: Any, ranks_of_data: int) -> Trainer:
    config = trainer_runs.arguments(made_of=DPOConfig, **args, **PLAIN)
    trainer = DPOTrainer(
        trainer_runs.model_of("muon"), trainer_runs.model_of("muon"), args=config,
        train_dataset=pairs(ranks_of_data), processing_class=tokenizer(),
        callbacks=[SpectralCallback()],
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = hook(config)
    return trainer


def reward(args: dict[str, Any], hook: Any, ranks_of_data: int) -> Trainer:
    config = trainer_runs.arguments(made_of=RewardConfig, **args, **PLAIN)
    shape = trainer_runs.model_of("muon").config
    shape.num_labels, shape.pad_token_id = 1, 0
    torch.manual_seed(0)
    # in float64: gradients of a reward are close to singular, and Muon's steps raise what rounding
    # leaves in them, in float32 to 1.6e-6 of difference between layouts
    return RewardTrainer(
        LlamaForSequenceClassification(shape).double(), args=config,
        train_dataset=pairs(ranks_of_data), processing_class=tokenizer(),
        optimizer_cls_and_kwargs=hook(config),
        callbacks=[SpectralCallback()],
    )  # fmt: skip


def different_words(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def grpo(args: dict[str, Any], hook: Any, ranks_of_data: int) -> Trainer:
    config = trainer_runs.arguments(
        made_of=GRPOConfig, num_generations=2, max_completion_length=6, **args, **PLAIN
    )
    trainer = GRPOTrainer(
        trainer_runs.model_of("muon"), reward_funcs=different_words, args=config,
        train_dataset=pairs(ranks_of_data).select_columns("prompt"),
        processing_class=tokenizer(), callbacks=[SpectralCallback()],
    )  # fmt: skip
    trainer.optimizer_cls_and_kwargs = hook(config)
    return trainer


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "sft": sft, "dpo": dpo, "reward": reward, "grpo": grpo,
}  # fmt: skip


def run(
    folder: str,
    layout: str,
    which: str,
    optimizer: str,
    resume: bool = False,
    ranks_of_data: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """A run with a checkpoint on the way, or the rest of one.

    Args:
        folder: of checkpoints.
        layout: as of trainer_runs.
        which: of ``TRAINERS``.
        optimizer: its name.
        resume: from the checkpoint.
        ranks_of_data: whose data; 0: of this run's ranks.
        changes: of TRL's configuration.
    """

    def hook(config: Any) -> tuple[Any, dict[str, Any]]:
        options = trainer_runs.OPTIONS[optimizer]
        return SpectralFactory, {"optimizer": optimizer, "args": config, **options}

    with quiet(), fresh(layout.startswith("fsdp")):
        args = {"folder": folder, "layout": layout, **changes}
        trainer = TRAINERS[which](args, hook, ranks_of_data or ranks())
        start = trainer_runs.weights(trainer.model)
        checkpoint = f"{folder}/checkpoint-{trainer_runs.SAVED_AT}" if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer_runs.check_layout(layout, trainer.model_wrapped)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    inner = trainer.optimizer.optimizer
    return {
        "losses": trainer_runs.losses(trainer), "start": start, "class": type(inner).__name__,
        "weights": trainer_runs.weights(trainer.model_wrapped),
        "norms": [entry["grad_norm"] for entry in history],
        "rewards": [entry.get("reward_std") for entry in history],
    }  # fmt: skip
