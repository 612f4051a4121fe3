"""TRL and PEFT: supervised fine-tuning of LoRA adapters with Muon, nothing downloaded.

torchrun --standalone --nproc_per_node 2 examples/trl_sft.py
"""

import tempfile

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from spectral_dist.integrations.huggingface import SpectralCallback, SpectralFactory


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 62 numbers; yours is AutoTokenizer.from_pretrained(...)."""
    words = {name: number for number, name in enumerate(["<pad>", "<eos>", *map(str, range(62))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def sequences() -> Dataset:
    """Return sequences in which every number follows from the one before it."""
    rows = (torch.arange(640)[:, None] + 3 * torch.arange(16)) % 62
    return Dataset.from_list([{"text": " ".join(map(str, row))} for row in rows.tolist()])


def main() -> None:
    """Train A and B of every projection; the rest of a Llama of random weights stays as it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, per_device_train_batch_size=8, max_steps=40, learning_rate=0.02,
            lr_scheduler_type="cosine", warmup_steps=5, logging_steps=20, save_steps=20,
            max_length=16, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            args,
            train_dataset=sequences(),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=16, target_modules="all-linear", modules_to_save=["lm_head"]),
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
