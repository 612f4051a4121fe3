"""torchtitan: its own training command and configuration, with one line changed.

torchrun --standalone --nproc_per_node 2 examples/torchtitan_fsdp2.py

It runs in a clone of github.com/pytorch/torchtitan, where the tokenizer and the text of its debug
model are. All of torchtitan's flags work (`--training.steps 50`), those of the optimizer as well
(`--optimizer.name sumo --optimizer.lr 0.01`). FSDP2 is what torchtitan does unless it is told
otherwise.
"""

import sys

from torchtitan import train
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from spectral_dist.integrations.torchtitan import SpectralOptimizers


def llama3_muon() -> Trainer.Config:
    """Return torchtitan's configuration of its debug model, with Muon."""
    config = llama3_debugmodel()
    # lr is that of matrices; embeddings, norms and the head have scalar_lr
    config.optimizer = SpectralOptimizers.Config(
        name="muon", lr=0.02, options={"scalar_lr": 3e-3, "momentum": 0.95}
    )
    config.parallelism.spmd_backend = "partial_dtensor"  # with torch 2.13
    return config


if __name__ == "__main__":
    sys.argv[1:1] = ["--module", "torchtitan_fsdp2", "--config", "llama3_muon"]
    train.main()
