"""A tiny Qwen2 in verl's FSDP engine, and the same training in a loop of our own; for ranks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import spectral_dist
from tests.support import verl_cpu
from tests.support.quiet import quiet

STEPS, SAVED_AT, RANKS, MICRO = 6, 3, 2, 2
"""Steps, the step of the checkpoint, ranks, and micro-batches of a step."""
CONTENTS = ("model", "optimizer", "extra")
"""The contents that checkpoints have."""
WARMUP = 2
LR, DECAY, BETAS, CLIP = 0.01, 0.1, (0.9, 0.95), 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"momentum": 0.9, "polar_dtype": "float32", "scalars": ["down_proj"], "eps": 1e-4},
    "SUMO": {"rank": 4, "period": 2, "eps": 1e-4},
    "NorMuon": {"polar_dtype": "float32", "eps": 1e-4},
    "POET": {"block": 8, "blocks": {"k_proj": [4, 8]}, "merge_every": 2, "eps": 1e-4},
}
CONVERTED = ("block", "blocks")
"""Options of POET that are the model's."""


def write_model(folder: Path, tied: bool = False) -> None:
    """The model, as from_pretrained reads it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def engine_of(
    folder: str, optimizer: str, options: dict[str, Any], strategy: str = "fsdp2",
    impl: str = "spectral_dist", offload: bool = False, contents: Sequence[str] = CONTENTS,
    model: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The engine, initialized, with the optimizer that its config names.

    ``model`` and ``settings`` are fields of verl's configs of the model and the engine.
    """
    verl_cpu.install()
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    of_model = HFModelConfig(**{
        "path": folder, "load_tokenizer": False, "use_remove_padding": False,
        "override_config": {"attn_implementation": "eager"},
        "enable_gradient_checkpointing": False, **(model or {}),
    })  # fmt: skip
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    of_engine = FSDPEngineConfig(**{
        "strategy": strategy, "use_torch_compile": False, "fsdp_size": -1, "model_dtype": "fp32",
        "mixed_precision": precision, "optimizer_offload": offload, "param_offload": offload,
        **(settings or {}),
    })  # fmt: skip
    optim = FSDPOptimizerConfig(
        lr=LR, weight_decay=DECAY, betas=BETAS, total_training_steps=STEPS, lr_warmup_steps=WARMUP,
        lr_scheduler_type="cosine", clip_grad=CLIP,
        optimizer=optimizer, optimizer_impl=impl, override_optimizer_config=options,
    )  # fmt: skip
    files = CheckpointConfig(save_contents=list(contents), load_contents=list(CONTENTS))
    with quiet():
        engine = FSDPEngine(of_model, of_engine, optim, files)
        engine.initialize()
    return engine


def batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    tokens = torch.randint(0, 64, (4, 17), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(engine: Any, steps: range) -> list[float]:
    """By the engine's own steps, as its training worker calls them."""
    losses = []
    for step in steps:
        with engine.train_mode():  # brings what is offloaded, and takes it away again
            engine.optimizer_zero_grad()
            for micro in range(MICRO):
                loss = loss_of(engine.module, *batch(step, dist.get_rank(), micro))
                (loss / MICRO).backward()
                losses.append(float(loss.detach()))
            with quiet():
                engine.optimizer_step()
            engine.lr_scheduler_step()
    return losses


def by_engine(folder: str, optimizer: str, offload: bool = False) -> list[float]:
    """All losses of this rank, with a checkpoint on the way."""
    engine = engine_of(folder, optimizer, OPTIONS[optimizer], offload=offload)
    assert type(engine.optimizer).__name__ == optimizer
    losses = train(engine, range(SAVED_AT))
    engine.save_checkpoint(f"{folder}/checkpoint", global_step=SAVED_AT)
    return losses + train(engine, range(SAVED_AT, STEPS))


def resumed(folder: str, optimizer: str, offload: bool = False) -> list[float]:
    """The losses after that checkpoint, by another engine."""
    engine = engine_of(folder, optimizer, OPTIONS[optimizer], offload=offload)
    engine.load_checkpoint(f"{folder}/checkpoint", del_local_after_load=False)
    return train(engine, range(SAVED_AT, STEPS))


def factor(step: int) -> float:
    """What the schedule multiplies rates with: up in a line, then down in half a cosine."""
    if step < WARMUP:
        return step / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))


def by_loop(folder: str, optimizer: str, steps: int = STEPS) -> tuple[Any, list[list[float]]]:
    """The model that the engine of ``RANKS`` ranks trains, in one process without verl.

    Beside it each rank's losses.
    """
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    options = dict(OPTIONS[optimizer])
    if optimizer == "POET":
        spectral_dist.poet.convert(model, **{name: options.pop(name) for name in CONVERTED})
    routing = {"scalars": options.pop("scalars", ())}
    with quiet():
        ours = getattr(spectral_dist, optimizer)(
            spectral_dist.param_groups(model, **routing), lr=LR, weight_decay=DECAY, betas=BETAS,
            **options,
        )  # fmt: skip
    losses: list[list[float]] = [[] for _ in range(RANKS)]
    rates = [group["lr"] for group in ours.param_groups]
    for step in range(steps):
        for rank, micro in itertools.product(range(RANKS), range(MICRO)):
            loss = loss_of(model, *batch(step, rank, micro))
            (loss / RANKS / MICRO).backward()
            losses[rank].append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group, rate in zip(ours.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        with quiet():
            ours.step()
        ours.zero_grad()
    return model, losses


WRONG: dict[str, dict[str, Any]] = {
    "name": {"optimizer": "Moun", "options": {}},
    "option": {"optimizer": "Muon", "options": {"momentun": 0.9}},
}


def error(folder: str, case: str) -> str:
    try:
        engine_of(folder, **WRONG[case])
    except ValueError as raised:
        return str(raised)
    return "nothing was raised"


def errors(folder: str) -> dict[str, str]:
    """What is said of each wrong config."""
    said = {case: error(folder, case) for case in WRONG}
    engine = engine_of(folder, "Muon", {})
    engine.engine_config = dataclasses.replace(engine.engine_config, strategy="fsdp")
    try:  # FSDP1 itself needs GPUs
        engine._build_optimizer(engine.module)
    except ValueError as raised:
        said["strategy"] = str(raised)
    return said


def of_torch(folder: str) -> tuple[str, str]:
    """The optimizer of a config that does not name ours, and what is said of another verl."""
    engine = engine_of(folder, "AdamW", {"eps": 1e-4}, impl="torch.optim")
    from spectral_dist.integrations import verl as ours

    try:
        ours.require("verl", "verl", "0.8.0", ours.KNOWN)
    except ImportError as raised:
        return type(engine.optimizer).__module__, str(raised)
    return type(engine.optimizer).__module__, ""
