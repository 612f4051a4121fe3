"""What a trainer of Hugging Face's family computed, and the same steps in a loop of our own.

The trainer's ranks record each batch as it reaches ``Trainer.training_step``, and its loss.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import spectral_dist
from spectral_dist.rules.options import ROUTING
from tests.support.quiet import quiet

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED_AT, RANKS, BATCH, ACCUMULATION = 6, 3, 2, 2, 2
LR, DECAY, WARMUP, CLIP = 0.01, 0.1, 2, 0.1  # Axolotl makes a warm-up of 1 one of 2
EQUAL, RESUMED = 1e-6, 1e-7
"""How far losses may be from the loop's, and a resumed run's from the whole run's; relative."""
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION,
    "max_steps": STEPS, "save_steps": SAVED_AT, "logging_steps": 1, "max_grad_norm": CLIP,
    "lr_scheduler_type": "cosine", "warmup_steps": WARMUP,
}  # fmt: skip
"""The Trainer's arguments, by its own names."""
ENGINES: dict[str, dict[str, Any]] = {
    f"zero{stage}": {
        "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    }
    for stage in (2, 3)
}  # fmt: skip
"""DeepSpeed's JSON; "auto" is what the Trainer fills in.

Without train_batch_size: swift makes a model for ZeRO-3 before there are ranks, when it would be
compared with that of one.
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"polar_dtype": "float32", "scalar_lr": 0.003},
    "sumo": {"rank": 4, "period": 2, "scalar_lr": 0.003},
    "poet": {"block": 8, "merge_every": 2},
}
ROTATION = ("block",)
"""Which of them are ``spectral_dist.poet.convert``'s."""


def write_inputs(folder: Path) -> None:
    """Write a tiny Llama with its tokenizer into ``model``, and rows into ``rows.json``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        ["hello"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_max_length=512,
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder / "model")
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} {i + 1}"} for i in range(64)]
    (folder / "rows.json").write_text(json.dumps(rows))


def cases(layouts: Iterable[str]) -> list[tuple[str, str]]:
    """Return layouts and optimizers to test."""
    return [(layout, name) for layout in layouts for name in OPTIONS]


def record(path: Path) -> None:
    """Write, when this process ends, what each call of ``Trainer.training_step`` got and gave."""
    from transformers import Trainer

    step, records = Trainer.training_step, []
    signature = inspect.signature(step)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        names = ("input_ids", "attention_mask", "labels")
        inputs = {k: v.clone() for k, v in bound["inputs"].items() if k in names}
        loss = step(self, *args, **kwargs)
        count = bound.get("num_items_in_batch")
        weight = 1.0 if count is not None else 1 / self.args.gradient_accumulation_steps
        if count is None or not self.args.average_tokens_across_devices:
            weight /= RANKS
        entry = {"inputs": inputs, "count": count, "weight": weight}
        ranks = getattr(bound["model"], "dp_world_size", dist.get_world_size())
        layout = (type(bound["model"]).__name__, ranks)
        records.append({**entry, "loss": float(loss), "layout": layout})
        return loss

    Trainer.training_step = training_step
    atexit.register(lambda: torch.save(records, path))


def launch(
    module: str, words: list[str], ranks: int = RANKS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests under torchrun, or in one process without it for 0 ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    unset = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **variables,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # for what trainers write where they run
        return subprocess.run(
            [sys.executable, *(torchrun if ranks else []), "-m", module, *words],
            cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip


def records_of(folder: Path, name: str, done: Any) -> list[list[dict[str, Any]]]:
    """Return each rank's records of a run that has ended well."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(RANKS)]


def layouts(by_rank: list[list[dict[str, Any]]]) -> set[tuple[str, int]]:
    """Return the classes of the trained models, with over how many ranks they are."""
    return {entry["layout"] for records in by_rank for entry in records}


def have_other_rows(by_rank: list[list[dict[str, Any]]]) -> bool:
    """Return whether the ranks have had different rows in every step."""
    micro_steps = zip(*by_rank, strict=True)
    rows = [[entry["inputs"]["input_ids"].tolist() for entry in step] for step in micro_steps]
    return all(row != first for first, *others in rows for row in others)


def losses(by_rank: list[list[dict[str, Any]]]) -> list[float]:
    """Return each step's loss, the mean over the ranks."""
    return [sum(entry["loss"] for entry in step) / RANKS for step in steps(by_rank)]


def steps(by_rank: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the records of each step of the optimizer, those of all ranks."""
    records = [entry for micro_step in zip(*by_rank, strict=True) for entry in micro_step]
    count = RANKS * ACCUMULATION
    return [records[i : i + count] for i in range(0, len(records), count)]


def are_equal(ours: list[float], wanted: list[float]) -> bool:
    """Return whether losses are those of the loop."""
    return difference(ours, wanted) < EQUAL


def difference(ours: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference between losses."""
    return max(abs(a / b - 1) for a, b in zip(ours, wanted, strict=True))


def by_loop(
    folder: Path, optimizer: str, by_rank: list[list[dict[str, Any]]], **changes: Any
) -> list[float]:
    """Return the losses of those batches in one process without any trainer."""
    from transformers import LlamaForCausalLM, get_scheduler

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    options = {**OPTIONS[optimizer], **changes}
    rotation = {name: options.pop(name) for name in ROTATION if name in options}
    routing = {name: options.pop(name) for name in ROUTING if name in options}
    titles = {"muon": "Muon", "sumo": "SUMO", "poet": "POET"}
    with quiet():
        if rotation:
            spectral_dist.poet.convert(model, **rotation)
        ours = getattr(spectral_dist, titles[optimizer])(
            spectral_dist.param_groups(model, **routing), lr=LR, weight_decay=DECAY, **options
        )
    found = []
    schedule = get_scheduler("cosine", ours, WARMUP, STEPS)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for step in steps(by_rank):
        losses_of_step = [_loss(model, entry) for entry in step]
        for loss in losses_of_step:
            loss.backward()
        assert nn.utils.clip_grad_norm_(trainable, CLIP) > CLIP
        with quiet():
            ours.step()
        schedule.step()
        ours.zero_grad()
        found.append(sum(float(loss.detach()) for loss in losses_of_step))
    return found


def of_checkpoint(folder: Path, by_rank: list[list[dict[str, Any]]]) -> float:
    """Return the loss that a checkpoint's model, by from_pretrained, has in the step after it."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(sum(_loss(model, entry) for entry in steps(by_rank)[SAVED_AT]))


def _loss(model: Any, entry: dict[str, Any]) -> Any:
    """Return what a micro-batch adds to its step's loss."""
    loss = model(**entry["inputs"], num_items_in_batch=entry["count"]).loss
    return loss * entry["weight"]
