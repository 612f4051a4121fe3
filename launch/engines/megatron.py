"""Megatron-core as an engine: tensor and data parallelism, its optimizers, its checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn.functional import pad

from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer, poet
from spectral_dist.launch import megatron_model
from spectral_dist.launch.engines.base import Engine
from spectral_dist.launch.megatron_config import ADAM, MegatronConfig
from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.yaml_config import ADAM_OPTIONS
from spectral_dist.monitor import Monitor
from spectral_dist.poet.layer import PoetLayer

CONVERTED = ("matrices", "scalars")
"""What of a YAML's routing says which layers are rotated."""


class MegatronEngine(Engine):
    """megatron-core's GPTModel on a grid of tensor-parallel x data-parallel ranks."""

    def __init__(self, config: MegatronConfig, model: Any, seed: int, ranks: Ranks) -> None:
        """`model` is a LlamaConfig. ValueError: a config that fits not the model or the ranks."""
        self.config, self.llama, self.kind = config, model, config.kind
        self.device, self.batch = ranks.device, config.batch
        across = config.tensor_parallel
        if ranks.world % across:
            raise config.fail(
                "tensor_parallel", f"{ranks.world} rank(s) cannot be cut into {across}s"
            )
        self.micro = config.micro_batch_size(ranks.world // across)
        config.check_model(model)
        parallel_state.initialize_model_parallel(across)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_ranks = parallel_state.get_data_parallel_world_size()
        model_parallel_cuda_manual_seed(seed)
        if ranks.first:
            print(f"layers: {megatron_model.layers(config)}", flush=True)
        self.gpt = megatron_model.build(model, config, seed, ranks.device)
        if config.rotates:
            _rotate(config, self.gpt)
        half = config.dtype == "bfloat16"
        self.model = DistributedDataParallel(
            self.gpt.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=config.use_distributed_optimizer,
                grad_reduce_in_fp32=half,
            ),
            Float16Module(self.gpt.config, self.gpt) if half else self.gpt,
        )
        self.megatron = _optimizer(config, self.model)
        self.optimizer = _inner(self.megatron)
        if config.monitor_every:
            self.optimizer.monitor = Monitor(config.monitor_every, [])
        self.done = 0  # steps, including those before a resume
        self._schedule()

    def logits(self, tokens: Tensor) -> Tensor:
        """(rows, length) -> float32 (rows, length, vocabulary), on all tensor-parallel ranks."""
        out: Tensor = self.model(*self._inputs(tokens), runtime_gather_output=True)
        return out[:, : tokens.shape[1]].float()

    def losses(self, rows: Tensor) -> Tensor:
        """(rows, length + 1) -> the loss in nats of each predicted token, (rows, length)."""
        tokens, targets = rows[:, :-1], rows[:, 1:]
        nats: Tensor = self.model(*self._inputs(tokens), labels=self._even(targets))
        return nats[:, : tokens.shape[1]].float()

    def _inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor, None]:
        """Tokens, positions, and no mask: attention is causal."""
        even = self._even(tokens)
        return even, torch.arange(even.shape[1], device=self.device).expand_as(even), None

    def _even(self, tokens: Tensor) -> Tensor:
        """On the device; padded at the end for sequence parallelism, which cuts the length."""
        missing = -tokens.shape[1] % self.config.tensor_parallel
        if missing and self.config.sequence_parallel:
            tokens = pad(tokens, (0, missing))
        return tokens.contiguous().to(self.device)

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, detached."""
        with nullcontext() if last else self.model.no_sync():
            loss = self.losses(rows).mean()
            share = self.micro * self.data_ranks / self.batch
            (loss * share).backward()  # type: ignore[no-untyped-call]
        if last:
            finalize_model_grads([self.model])
        return loss.detach()

    def step(self) -> None:
        """Optimizer and schedule, once the last micro-batch is done."""
        self.megatron.step()
        self.model.zero_grad_buffer()
        self.megatron.zero_grad()
        self.done += 1
        self._schedule()

    def _schedule(self) -> None:
        """Write what Megatron's scheduler writes, by the schedule of the other engines."""
        for group in self.megatron.param_groups:
            group["lr"] = self.lr
            group["weight_decay"] = self.config.options.weight_decay * group["wd_mult"]

    @property
    def lr(self) -> float:
        """The learning rate for the step to come."""
        return self.config.options.lr * self.config.lr_factor(self.done)

    @property
    def parameters(self) -> int:
        """Numbers in the whole model, and in the one that POET's is exported as."""
        layers = [m for m in self.gpt.modules() if isinstance(m, PoetLayer)]
        added = {id(skew) for layer in layers for skew in layer.skews.values()}
        return sum(self._numel(p) for p in self.gpt.parameters() if id(p) not in added)

    @property
    def trained(self) -> int:
        """Numbers that have a gradient."""
        return sum(self._numel(p) for p in self.gpt.parameters() if p.requires_grad)

    def _numel(self, parameter: Tensor) -> int:
        cut = getattr(parameter, "tensor_model_parallel", False)
        return parameter.numel() * (self.config.tensor_parallel if cut else 1)

    def write(self, target: Path) -> None:
        """Checkpoint everything into the folder `target`, which is there; on all ranks."""
        extra = {"done": self.done}
        dist_checkpointing.save({**self._content(loading=False), "extra": extra}, str(target))

    def read(self, source: Path) -> None:
        """Restore what `write` has written; on all ranks. ValueError: it was another engine."""
        if not dist_checkpointing.check_is_distributed_checkpoint(str(source)):
            raise ValueError(f"{source} was not saved by --engine megatron")
        extra = dist_checkpointing.load_common_state_dict(str(source))["extra"]
        saved = dist_checkpointing.load(self._content(loading=True), str(source))
        self.gpt.load_state_dict(saved["model"])
        self.megatron.load_state_dict(saved["optimizer"])
        self.done = int(extra["done"])
        self._schedule()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from; JSON."""
        return {"engine": "megatron", **self.config.identity()}

    def _content(self, *, loading: bool) -> dict[str, Any]:
        model = self.gpt.sharded_state_dict()
        optimizer = self.megatron.sharded_state_dict(model, is_loading=loading)
        return {"model": model, "optimizer": optimizer}


def _rotate(config: MegatronConfig, gpt: Any) -> None:
    """ValueError: blocks that do not fit, names that are not there."""
    which = {name: config.routing[name] for name in CONVERTED if name in config.routing}
    try:
        poet.convert(gpt, **which, **config.rotation)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None


def _optimizer(config: MegatronConfig, model: Any) -> Any:
    options = config.options
    half = config.dtype == "bfloat16"
    settings = OptimizerConfig(
        optimizer=config.kind,
        lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        clip_grad=config.clip,
        bf16=half,
        params_dtype=getattr(torch, config.dtype),
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    if config.kind == ADAM:
        return get_megatron_optimizer(settings, [model])
    own = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ADAM_OPTIONS}
    done = CONVERTED if config.rotates else ()
    routing = {name: value for name, value in config.routing.items() if name not in done}
    try:
        return get_spectral_megatron_optimizer(settings, [model], **own, **routing)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None


def _inner(megatron: Any) -> Any:
    """The torch optimizer inside: one, since these models have no experts."""
    (leaf,) = getattr(megatron, "chained_optimizers", [megatron])
    return leaf.optimizer
