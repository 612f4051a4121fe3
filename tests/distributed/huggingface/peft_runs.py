"""The tiny Llama of trainer_runs with PEFT's adapters, trained by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaForCausalLM

from tests.distributed.huggingface import trainer_runs
from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support.quiet import quiet

RANK = 4
"""LoRA's r."""
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "up_proj"]},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def model_of(kind: str, optimizer: str = "muon") -> PeftModel:
    """Return a model in float64: gradients of A are 0 in the first step, and tiny after it."""
    base: LlamaForCausalLM = trainer_runs.model_of(optimizer)
    config = LoraConfig(r=RANK, task_type="CAUSAL_LM", **KINDS[kind])
    with quiet():
        return get_peft_model(base.double(), config).double()


def by_trainer(folder: str, layout: str, kind: str, optimizer: str) -> dict[str, Any]:
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_runs.trainer_of(folder, layout, optimizer, model=model_of(kind))
        trainer.train()
    trainer_runs.check_layout(layout, trainer.model_wrapped)
    return {
        "losses": trainer_runs.losses(trainer),
        "weights": trainer_runs.weights(trainer.model_wrapped),
    }


def resumed(folder: str, layout: str, kind: str, optimizer: str) -> dict[str, Any]:
    with quiet(), fresh(layout.startswith("fsdp")):
        trainer = trainer_runs.trainer_of(
            folder, layout, optimizer, model=model_of(kind), save_strategy="no"
        )
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{trainer_runs.SAVED_AT}")
    return {
        "losses": trainer_runs.losses(trainer),
        "weights": trainer_runs.weights(trainer.model_wrapped),
    }


def by_loop(ranks: int, kind: str, optimizer: str) -> dict[str, Any]:
    return trainer_runs.by_loop(ranks, optimizer, model_of(kind))


def adapters_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what PEFT saves of a model."""
    with quiet():
        state: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    return state


def saved_adapters(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapters of a checkpoint, as PEFT loads them."""
    base = trainer_runs.model_of("muon").double()
    with quiet():
        return adapters_of(PeftModel.from_pretrained(base, folder))


def by_deepspeed(
    folder: str, stage: int, in_json: bool, kind: str, resume: bool = False
) -> dict[str, Any]:
    """A run under ZeRO, or the rest of one, in float32."""
    from tests.distributed.huggingface import deepspeed_runs

    checkpoint = f"{folder}/checkpoint-{trainer_runs.SAVED_AT}" if resume else None
    return deepspeed_runs.run(
        folder, stage, "muon", in_json, resume=checkpoint, model=model_of(kind).float()
    )
