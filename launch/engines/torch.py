"""Train with DistributedDataParallel or FSDP2, whose checkpoints either of the two can load."""

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
    """Plain torch on one process or more, with a linear warmup, then a cosine to a tenth."""

    def __init__(
        self, config: TorchConfig, model: Any, seed: int, ranks: Ranks, *, sharded: bool
    ) -> None:
        """Build the model and its optimizer.

        Args:
            config: the content of the YAML.
            model: a LlamaConfig.
            seed: of the initial weights.
            ranks: all ranks of the job.
            sharded: shard the model with FSDP2; else use DistributedDataParallel.

        Raises:
            ValueError: the config does not fit the engine, the model or the ranks.
        """
        config.check_engine("fsdp" if sharded else "ddp")
        self.config, self.llama, self.kind = config, model, config.kind
        self.device, self.batch = ranks.device, config.batch
        tensor_parallel = config.tensor_parallel
        mesh = torch_sharding.make_mesh(config, ranks) if sharded else None
        self.data_rank = ranks.rank // tensor_parallel
        self.data_ranks = ranks.world // tensor_parallel
        self.micro = config.micro_batch_size(self.data_ranks)
        self.model = llama.build(model, seed)
        skews = set(map(id, _convert_to_poet(config, self.model)))
        for parameter in self.model.parameters():  # buffers, as rotary frequencies, stay float32
            # POET's skew parameters stay float32; FSDP2 wants all that trains to have one dtype.
            trains_in_float32 = sharded and parameter.requires_grad
            if not skews or not (id(parameter) in skews or trains_in_float32):
                parameter.data = parameter.data.to(getattr(torch, config.dtype))
        if mesh is not None:
            torch_sharding.shard(self.model, mesh, config)  # also moves the shards to the device
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
        """Build the optimizer that the configuration names; benchmarks override this."""
        return _optimizer(self.config, self.model)

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Run forward and backward of one micro-batch, and return its mean loss, detached."""
        model = self.model
        no_sync: AbstractContextManager[Any] = nullcontext()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            no_sync = model.no_sync()
        with no_sync:
            loss = self.losses(rows).mean()
            loss_weight = self.micro * self.data_ranks / self.batch
            (loss * loss_weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        """Clip the gradients, then step the optimizer and the schedule."""
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
        """Return the learning rate for the next step, of the first group that is not AdamW's."""
        groups = self.optimizer.param_groups
        return float(min(groups, key=lambda group: group.get("kind") == "scalar")["lr"])

    def write(self, target: Path) -> None:
        """Write a checkpoint into the existing folder ``target``; all ranks call this."""
        scheduler = self.scheduler.state_dict()
        if self.kind == ADAMW:
            file = io.BytesIO()
            torch.save({"scheduler": scheduler}, file)
            checkpoint_files.write(target, {**self._adamw_state(), "extra": file.getvalue()})
        else:
            checkpoint.save(target, self.model, self.optimizer, scheduler=scheduler)

    def read(self, source: Path) -> None:
        """Restore what ``write`` has written; all ranks call this.

        Raises:
            ValueError: another engine has written it.
        """
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
        """Return the settings that a resumed run must not change, as JSON."""
        return {"engine": "ddp or fsdp", **self.config.identity()}

    def _adamw_state(self) -> dict[str, Any]:
        """Return the state of the model and of torch's AdamW, by name of the parameter."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "adamw": optimizer}


def _convert_to_poet(config: TorchConfig, model: nn.Module) -> list[nn.Parameter]:
    """Convert the model if the optimizer is POET, and return its skew parameters."""
    if not config.rotates:
        return []
    try:
        poet.convert(model, **config.routing, **config.rotation)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None
    layers = [module for module in model.modules() if isinstance(module, poet.PoetLayer)]
    return [skew for layer in layers for skew in layer.skews.values()]


def _optimizer(config: TorchConfig, model: nn.Module) -> Any:
    """Build the optimizer that the configuration names."""
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
    option_values = {f.name: getattr(options, f.name) for f in fields(options)}
    try:
        routing = {} if config.rotates else config.routing  # the conversion has used it
        groups = spectral_dist.param_groups(model, **routing)
        return getattr(spectral_dist, config.kind)(groups, **option_values)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None
