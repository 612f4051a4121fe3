"""Hugging Face's Trainer: a Llama, Muon by one line, a checkpoint that the Trainer resumes.

torchrun --standalone --nproc_per_node 2 examples/huggingface_trainer.py
"""

import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from spectral_dist.integrations.huggingface import SpectralCallback, SpectralFactory


def sequences() -> list[dict[str, list[int]]]:
    """Return sequences in which every token follows from the one before it."""
    rows = (torch.arange(640)[:, None] + 3 * torch.arange(16)) % 64
    return [{"input_ids": row, "labels": row} for row in rows.tolist()]


def main() -> None:
    """Train a small Llama on every rank's own part of the batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, max_steps=40, learning_rate=5e-3,
            lr_scheduler_type="cosine", warmup_steps=5, logging_steps=20, save_steps=20,
            report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=args,
            train_dataset=sequences(),
            optimizer_cls_and_kwargs=(SpectralFactory, {"optimizer": "muon", "args": args}),
            callbacks=[SpectralCallback()],
        )
        trainer.train()
        first, last = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        if trainer.is_world_process_zero():
            print(f"loss {first:.3f} -> {last:.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
