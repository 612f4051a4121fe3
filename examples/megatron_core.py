"""Megatron-core: one import, and a name in the optimizer's config. It needs GPUs.

torchrun --standalone --nproc_per_node 4 examples/megatron_core.py
"""

import os

# before Megatron's own modules, which then know the name "spectral_muon"
import spectral_dist.integrations.megatron  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from one_process import batch


def build() -> DistributedDataParallel:
    """Build this rank's part of a small GPT: 2 tensor-parallel ranks, the others data-parallel."""
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=2,
        add_bias_linear=False, normalization="RMSNorm", pipeline_dtype=torch.float32,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, layer, vocab_size=64, max_sequence_length=16)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(config, settings, model.to(torch.get_default_device()))


def main() -> None:
    """Train: 2 tensor-parallel ranks share a part of the batch."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.set_default_device(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(0)
    model = build()
    flags = {"optimizer": "spectral_muon", "lr": 0.02, "weight_decay": 0.1, "clip_grad": 1.0}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(**flags, use_distributed_optimizer=True), [model]
    )
    part = slice(
        parallel_state.get_data_parallel_rank(), None, parallel_state.get_data_parallel_world_size()
    )
    for step in range(60):
        tokens, targets = (x[part].to(torch.get_default_device()) for x in batch(step))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=targets).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
