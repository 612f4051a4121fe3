"""verl's FSDP engine, with the names of our optimizer in its config. It needs GPUs.

torchrun --standalone --nproc_per_node 2 examples/verl_fsdp2.py

verl's own trainers make this engine of their configs: set the variable below for them, and write
actor.strategy=fsdp2 actor.optim.optimizer_impl=spectral_dist actor.optim.optimizer=Muon
"""

import os
import tempfile

os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "spectral_dist.integrations.verl")

# isort: split
import torch
import torch.distributed as dist
from one_process import batch
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine


def engine_of(folder: str) -> FSDPEngine:
    """Make the engine of a small random model, which rank 0 writes into a folder."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    model = HFModelConfig(
        path=folder, load_tokenizer=False, use_remove_padding=False,
        override_config={"attn_implementation": "eager"},
    )  # fmt: skip
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    settings = FSDPEngineConfig(strategy="fsdp2", model_dtype="fp32", mixed_precision=precision)
    optimizer = FSDPOptimizerConfig(
        optimizer_impl="spectral_dist", optimizer="Muon", lr=0.02, weight_decay=0.1,
        override_optimizer_config={"momentum": 0.95, "scalar_lr": 3e-3}, total_training_steps=60,
    )  # fmt: skip
    engine = FSDPEngine(model, settings, optimizer, CheckpointConfig())
    engine.initialize()
    return engine


def main() -> None:
    """Train on every rank's own part of the batch."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    engine = engine_of(folders[0])
    part = slice(dist.get_rank(), None, dist.get_world_size())
    for step in range(60):
        tokens, targets = (x[part].to(device) for x in batch(step))
        with engine.train_mode():
            logits = engine.module(input_ids=tokens, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            engine.optimizer_step()
            engine.optimizer_zero_grad()
            engine.lr_scheduler_step()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
