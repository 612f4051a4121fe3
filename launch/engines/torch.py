"""DistributedDataParallel and FSDP2 as engines, and their checkpoints, which either can load."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist import checkpoint, poet
from spectral_dist.checkpoint import files as checkpoint_files
from spectral_dist.launch import llama, torch_sharding
from spectral_dist.launch.engines.base import Engine
from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.torch_config import ADAMW, TorchConfig
from spectral_dist.monitor import Monitor


class TorchEngine(Engine):
    """Plain torch on one process or more; linear warmup, then a cosine to a tenth."""

    def __init__(
        self, config: TorchConfig, model: Any, seed: int, ranks: Ranks, *, sharded: bool
    ) -> None:
        """`model` is a LlamaConfig; `sharded`: by FSDP2, else DistributedDataParallel.

        ValueError: a config that does not fit the engine, the model or the ranks.
        """
        config.check_engine("fsdp" if sharded else "ddp")
        self.config, self.llama, self.kind = config, model, config.kind
        self.device, self.batch = ranks.device, config.batch
        across = config.tensor_parallel
        mesh = torch_sharding.make_mesh(config, ranks) if sharded else None
        self.data_rank, self.data_ranks = ranks.rank // across, ranks.world // across
        self.micro = config.micro_batch_size(self.data_ranks)
        self.model = llama.build(model, seed)
        skews = set(map(id, _rotate(config, self.model)))
        for parameter in self.model.parameters():  # and not the rotary frequencies
            # which FSDP2 wants of one dtype, as far as it trains
            wide = skews and (id(parameter) in skews or (sharded and parameter.requires_grad))
            if not wide:
                parameter.data = parameter.data.to(getattr(torch, config.dtype))
        if mesh is not None:
            torch_sharding.shard(self.model, mesh, config)  # moves what it cuts to the device
        self.model = self.model.to(ranks.device)
        if mesh is None and ranks.world > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: config.lr_factor(step)
        )
        if config.monitor_every:
            self.optimizer.monitor = Monitor(config.monitor_every, [])

    def make_optimizer(self) -> Any:
        """As the configuration says."""
        return _optimizer(self.config, self.model)

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, detached."""
        model = self.model
        unsynced: AbstractContextManager[Any] = nullcontext()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            unsynced = model.no_sync()
        with unsynced:
            loss = self.losses(rows).mean()
            share = self.micro * self.data_ranks / self.batch
            (loss * share).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        """Optimizer and schedule, once the last micro-batch is done."""
        if self.config.clip > 0:
            limit = self.config.clip
            if isinstance(self.optimizer, spectral_dist.POET):
                limit *= self.optimizer.clip_factor()
            torch_sharding.clip_gradients(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()

    @property
    def lr(self) -> float:
        """The learning rate for the step to come: that of the first group that is not AdamW's."""
        groups = self.optimizer.param_groups
        return float(min(groups, key=lambda group: group.get("kind") == "scalar")["lr"])

    def write(self, target: Path) -> None:
        """Checkpoint everything into the folder `target`, which is there; on all ranks."""
        scheduler = self.scheduler.state_dict()
        if self.kind == ADAMW:
            file = io.BytesIO()
            torch.save({"scheduler": scheduler}, file)
            checkpoint_files.write(target, {**self._adamw_state(), "extra": file.getvalue()})
        else:
            checkpoint.save(target, self.model, self.optimizer, scheduler=scheduler)

    def read(self, source: Path) -> None:
        """Restore what `write` has written; on all ranks. ValueError: it was another engine."""
        if not (source / ".metadata").is_file():
            raise ValueError(f"{source} was not saved by --engine ddp or fsdp")
        if self.kind == ADAMW:
            content = {**self._adamw_state(), "extra": b""}
            checkpoint_files.read(source, content)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=content["model"],
                optim_state_dict=content["adamw"],
            )
            extra = torch.load(io.BytesIO(content["extra"]), weights_only=True)
        else:
            extra = checkpoint.load(source, self.model, self.optimizer)
        self.scheduler.load_state_dict(extra["scheduler"])

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from; JSON."""
        return {"engine": "ddp or fsdp", **self.config.identity()}

    def _adamw_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "adamw": optimizer}


def _rotate(config: TorchConfig, model: nn.Module) -> list[nn.Parameter]:
    """Convert the model if POET is to train it; its skew parameters."""
    if not config.rotates:
        return []
    try:
        poet.convert(model, **config.routing, **config.rotation)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None
    layers = [module for module in model.modules() if isinstance(module, poet.PoetLayer)]
    return [skew for layer in layers for skew in layer.skews.values()]


def _optimizer(config: TorchConfig, model: nn.Module) -> Any:
    options = config.options
    if config.kind == ADAMW:
        meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
        return torch.optim.AdamW(
            model.parameters(),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            foreach=False if len(meshes) > 1 else None,  # torch cannot mix meshes in one call
        )
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    try:
        routing = {} if config.rotates else config.routing  # of which the conversion was told
        groups = spectral_dist.param_groups(model, **routing)
        return getattr(spectral_dist, config.kind)(groups, **given)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None
