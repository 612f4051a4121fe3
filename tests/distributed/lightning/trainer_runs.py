"""A tiny model under Lightning's Trainer, and the same training in a loop of our own."""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import spectral_dist
from tests.support.quiet import quiet

EPOCHS, STEPS, ACCUMULATION, BATCH, LENGTH, WIDTH, WORDS = 2, 3, 2, 4, 8, 16, 48
"""STEPS are those of an epoch, BATCH is that of all ranks."""
LR, CLIP, BLOCK = 0.02, 0.5, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"polar": "jordan", "polar_dtype": "float32"},
    "SUMO": {"rank": 4, "period": 2},
    "POET": {"merge_every": 2},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.head(self.norm(h + self.down(torch.relu(self.up(h)))))


def net_of(name: str) -> Net:
    net = Net()
    if name != "Muon":
        net.double()  # AdamW of skews, and bases of SUMO, amplify float32's rounding
    if name == "POET":
        spectral_dist.poet.convert(net, block=BLOCK)
    return net


def loss_of(net: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_of(model: nn.Module, name: str) -> Any:
    made_of = getattr(spectral_dist, name)
    groups = spectral_dist.param_groups(model)
    return made_of(groups, lr=LR, weight_decay=0.1, scalar_lr=0.01, **OPTIONS[name])


def schedule_of(optimizer: Any) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, EPOCHS * STEPS + 2)


class Lit(lightning.LightningModule):
    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        self.name, self.net, self.losses = name, net, list[float]()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net.up, self.net.down, self.net):
                fully_shard(part, mesh=mesh)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = loss_of(self.net, batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.trainer.strategy.model, self.name)
        if any(isinstance(callback, Thaw) for callback in self.trainer.callbacks):
            return optimizer  # CosineAnnealingLR refuses any optimizer that gets another group
        return [optimizer], [{"scheduler": schedule_of(optimizer), "interval": "step"}]


class Thaw(BaseFinetuning):
    """Train ``down`` from the second epoch on, as Lightning's documentation writes it."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.net.down)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.down, optimizer, lr=LR / 2)


def rows() -> Tensor:
    """Return as many as all ranks take in an epoch."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(WORDS, (STEPS * ACCUMULATION * BATCH, LENGTH), generator=generator)


def strategy_of(layout: str) -> Strategy | str:
    if layout == "ddp":
        return DDPStrategy()
    if layout.startswith("fsdp"):
        return ModelParallelStrategy(
            data_parallel_size=dist.get_world_size(), tensor_parallel_size=1,
            save_distributed_checkpoint=layout == "fsdp",
        )  # fmt: skip
    return "auto"


def fit(
    folder: str,
    layout: str,
    name: str,
    resume: str | None = None,
    callbacks: tuple[Callback, ...] = (),
    **changes: Any,
) -> lightning.Trainer:
    """A run that saves after each epoch, or the rest of one, which saves nothing.

    Args:
        folder: of checkpoints.
        layout: see ``strategy_of``.
        name: of the optimizer.
        resume: the checkpoint that the rest goes on from.
        callbacks: beside the one that saves.
        changes: of the Trainer's arguments; ``net`` is the model.
    """
    net = changes.pop("net", None) or net_of(name)
    changes = {"strategy": strategy_of(layout), "max_epochs": EPOCHS, **changes}
    changes = {"gradient_clip_val": CLIP, **changes}
    world = dist.get_world_size()
    if resume is None:
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callbacks = (*callbacks, saving)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world,
        # Lightning looks for MPI by itself, and fails where mpi4py has no library
        plugins=[LightningEnvironment()],
        accumulate_grad_batches=ACCUMULATION, callbacks=list(callbacks), logger=False,
        enable_checkpointing=resume is None, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=folder, **changes,
    )  # fmt: skip
    data = TensorDataset(rows())
    # Lightning's own sampler would shuffle
    sampler = DistributedSampler(data, world, dist.get_rank(), shuffle=False)
    loader = DataLoader(data, BATCH // world, sampler=sampler)
    with quiet():
        trainer.fit(Lit(name, net), loader, ckpt_path=resume)
    return trainer


def result(trainer: lightning.Trainer) -> dict[str, Any]:
    net = trainer.lightning_module.net
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    weights = {key: value.clone() for key, value in state.items()}
    return {"weights": weights, "losses": trainer.lightning_module.losses}


def whole(folder: str, layout: str, name: str) -> dict[str, Any]:
    return result(fit(folder, layout, name))


def resumed(folder: str, layout: str, name: str) -> dict[str, Any]:
    """The second epoch, by another Trainer."""
    return result(fit(folder, layout, name, resume=f"{folder}/epoch=0.ckpt"))


def thawed(folder: str, layout: str, name: str) -> dict[str, Any]:
    return result(fit(folder, layout, name, callbacks=(Thaw(),)))


def by_loop(
    name: str,
    thaw: bool = False,
    net: nn.Module | None = None,
    scheduled: bool = True,
    divided: int = 1,
) -> dict[str, Any]:
    """What the Trainer does, in one process and without it.

    Args:
        name: of the optimizer.
        thaw: as the callback does.
        net: the model; None: as the Trainer's.
        scheduled: whether the learning rate follows ``schedule_of``; not with ``thaw``.
        divided: what gradients, and the norm that they are clipped to, are divided by.
    """
    net = net or net_of(name)
    scheduled = scheduled and not thaw
    net.down.requires_grad_(not thaw)
    with quiet():  # named as in Lit: SUMO's sketches and refreshes follow from matrices' names
        optimizer = optimizer_of(nn.ModuleDict({"net": net}), name)
    schedule = schedule_of(optimizer)
    losses = []
    for epoch in range(EPOCHS):
        if thaw and epoch == 1:
            net.down.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.down.parameters()), "lr": LR / 2})
        for batch in rows().chunk(STEPS):
            loss = loss_of(net, batch)
            (loss / divided).backward()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, CLIP / divided)
            with quiet():
                optimizer.step()
            if scheduled:
                schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return {"weights": {k: v.clone() for k, v in net.state_dict().items()}, "losses": losses}


def rethawed(folder: str, layout: str, name: str) -> dict[str, Any]:
    path = f"{folder}/epoch=1.ckpt"
    return result(fit(folder, layout, name, path, (Thaw(),), max_epochs=3))
