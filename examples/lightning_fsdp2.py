"""Lightning: FSDP2, and a checkpoint from which the same command goes on.

torchrun --standalone --nproc_per_node 2 examples/lightning_fsdp2.py runs/example    # an epoch
torchrun --standalone --nproc_per_node 2 examples/lightning_fsdp2.py runs/example    # one more
"""

import os
import sys
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from one_process import Model, batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import spectral_dist

RANKS = int(os.environ["WORLD_SIZE"])


class Lit(lightning.LightningModule):
    """The model of one_process.py, sharded, with an optimizer by one line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()

    def configure_model(self) -> None:
        """Shard each block, then the rest."""
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.model.blocks, self.model):
            fully_shard(part, mesh=mesh)

    def training_step(self, rows: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        logits = self.model(rows[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[1].flatten())
        if index % 30 == 29 and self.global_rank == 0:
            print(f"epoch {self.current_epoch}: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> spectral_dist.Muon:
        """Return Muon of the model as Lightning's strategy has it."""
        groups = spectral_dist.param_groups(self.trainer.strategy.model)
        return spectral_dist.Muon(groups, lr=0.02, scalar_lr=3e-3)


def main(folder: Path) -> None:
    """Train for an epoch, from the last checkpoint in ``folder`` if there is one, and save."""
    steps = [batch(step) for step in range(60)]
    data = TensorDataset(*(torch.cat(part) for part in zip(*steps, strict=True)))
    checkpoints = sorted(folder.glob("epoch=*.ckpt"))
    trainer = lightning.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
        accelerator="auto", devices=RANKS, max_epochs=len(checkpoints) + 1, gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # Lightning gives each rank a part of its own, in another order
    loader = DataLoader(data, 32 // RANKS, shuffle=True)
    trainer.fit(Lit(), loader, ckpt_path=checkpoints[-1] if checkpoints else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
