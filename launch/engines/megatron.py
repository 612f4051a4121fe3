"""Train with Megatron-core: tensor and data parallelism, its optimizers and its checkpoints."""

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
"""Keys of a YAML's routing that select the layers to rotate, and so are for the conversion."""


class MegatronEngine(Engine):
    """megatron-core's GPTModel on a grid of tensor-parallel x data-parallel ranks."""

    def __init__(self, config: MegatronConfig, model: Any, seed: int, ranks: Ranks) -> None:
        """Build the model and its optimizer.

        Args:
            config: the content of the YAML.
            model: a LlamaConfig.
            seed: of the initial weights.
            ranks: all ranks of the job.

        Raises:
            ValueError: the config does not fit the model or the ranks.
        """
        self.config, self.llama, self.kind = config, model, config.kind
        self.device, self.batch = ranks.device, config.batch
        tensor_parallel = config.tensor_parallel
        if ranks.world % tensor_parallel:
            raise config.fail(
                "tensor_parallel", f"{ranks.world} rank(s) cannot be cut into {tensor_parallel}s"
            )
        self.micro = config.micro_batch_size(ranks.world // tensor_parallel)
        config.check_model(model)
        parallel_state.initialize_model_parallel(tensor_parallel)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_ranks = parallel_state.get_data_parallel_world_size()
        model_parallel_cuda_manual_seed(seed)
        if ranks.first:
            print(f"layers: {megatron_model.layers(config)}", flush=True)
        self.gpt = megatron_model.build(model, config, seed, ranks.device)
        if config.rotates:
            _convert_to_poet(config, self.gpt)
        is_bf16 = config.dtype == "bfloat16"
        self.model = DistributedDataParallel(
            self.gpt.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=config.use_distributed_optimizer,
                grad_reduce_in_fp32=is_bf16,
            ),
            Float16Module(self.gpt.config, self.gpt) if is_bf16 else self.gpt,
        )
        self.megatron_optimizer = _optimizer(config, self.model)
        self.optimizer = _inner_optimizer(self.megatron_optimizer)
        if config.monitor_every:
            self.optimizer.monitor = Monitor(config.monitor_every, [])
        self.done = 0  # steps, including those before a resume
        self._set_rates()

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute the logits of tokens, on all tensor-parallel ranks.

        Args:
            tokens: (rows, length).

        Returns:
            float32, (rows, length, vocabulary).
        """
        out: Tensor = self.model(*self._inputs(tokens), runtime_gather_output=True)
        return out[:, : tokens.shape[1]].float()

    def losses(self, rows: Tensor) -> Tensor:
        """Compute the loss in nats of each predicted token, as (rows, length)."""
        tokens, targets = rows[:, :-1], rows[:, 1:]
        nats: Tensor = self.model(*self._inputs(tokens), labels=self._to_device(targets))
        return nats[:, : tokens.shape[1]].float()

    def _inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return tokens, positions, and no mask, since attention is causal."""
        padded = self._to_device(tokens)
        return padded, torch.arange(padded.shape[1], device=self.device).expand_as(padded), None

    def _to_device(self, tokens: Tensor) -> Tensor:
        """Move tokens to the device; sequence parallelism pads them to a multiple of the ranks."""
        padding = -tokens.shape[1] % self.config.tensor_parallel
        if padding and self.config.sequence_parallel:
            tokens = pad(tokens, (0, padding))
        return tokens.contiguous().to(self.device)

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Run forward and backward of one micro-batch, and return its mean loss, detached."""
        with nullcontext() if last else self.model.no_sync():
            loss = self.losses(rows).mean()
            loss_weight = self.micro * self.data_ranks / self.batch
            (loss * loss_weight).backward()  # type: ignore[no-untyped-call]
        if last:
            finalize_model_grads([self.model])
        return loss.detach()

    def step(self) -> None:
        """Step the optimizer and the schedule, after the last micro-batch."""
        self.megatron_optimizer.step()
        self.model.zero_grad_buffer()
        self.megatron_optimizer.zero_grad()
        self.done += 1
        self._set_rates()

    def _set_rates(self) -> None:
        """Set every group's lr and weight decay, in place of Megatron's own scheduler."""
        for group in self.megatron_optimizer.param_groups:
            group["lr"] = self.lr
            group["weight_decay"] = self.config.options.weight_decay * group["wd_mult"]

    @property
    def lr(self) -> float:
        """Return the learning rate for the next step."""
        return self.config.options.lr * self.config.lr_factor(self.done)

    @property
    def num_parameters(self) -> int:
        """Return the number of weights of the whole model, without what POET adds."""
        layers = [m for m in self.gpt.modules() if isinstance(m, PoetLayer)]
        added = {id(skew) for layer in layers for skew in layer.skews.values()}
        return sum(self._numel(p) for p in self.gpt.parameters() if id(p) not in added)

    @property
    def num_trained(self) -> int:
        """Return the number of elements that have a gradient."""
        return sum(self._numel(p) for p in self.gpt.parameters() if p.requires_grad)

    def _numel(self, parameter: Tensor) -> int:
        """Return the elements of a whole parameter, of which this rank may hold a tile."""
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        return parameter.numel() * (self.config.tensor_parallel if is_sharded else 1)

    def write(self, target: Path) -> None:
        """Write a checkpoint into the existing folder ``target``; all ranks call this."""
        extra = {"done": self.done}
        dist_checkpointing.save({**self._content(loading=False), "extra": extra}, str(target))

    def read(self, source: Path) -> None:
        """Restore what ``write`` has written; all ranks call this.

        Raises:
            ValueError: another engine has written it.
        """
        if not dist_checkpointing.check_is_distributed_checkpoint(str(source)):
            raise ValueError(f"{source} was not saved by --engine megatron")
        extra = dist_checkpointing.load_common_state_dict(str(source))["extra"]
        saved = dist_checkpointing.load(self._content(loading=True), str(source))
        self.gpt.load_state_dict(saved["model"])
        self.megatron_optimizer.load_state_dict(saved["optimizer"])
        self.done = int(extra["done"])
        self._set_rates()

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change, as JSON."""
        return {"engine": "megatron", **self.config.identity()}

    def _content(self, *, loading: bool) -> dict[str, Any]:
        """Return the sharded state of model and optimizer, to save or to load into."""
        model = self.gpt.sharded_state_dict()
        optimizer = self.megatron_optimizer.sharded_state_dict(model, is_loading=loading)
        return {"model": model, "optimizer": optimizer}


def _convert_to_poet(config: MegatronConfig, gpt: Any) -> None:
    """Convert the model's layers to POET's.

    Raises:
        ValueError: the blocks do not fit, or a name selects no parameter.
    """
    selection = {name: config.routing[name] for name in CONVERTED if name in config.routing}
    try:
        poet.convert(gpt, **selection, **config.rotation)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None


def _optimizer(config: MegatronConfig, model: Any) -> Any:
    """Build the optimizer that the configuration names, as Megatron's own script does."""
    options = config.options
    is_bf16 = config.dtype == "bfloat16"
    settings = OptimizerConfig(
        optimizer=config.kind,
        lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        clip_grad=config.clip,
        bf16=is_bf16,
        params_dtype=getattr(torch, config.dtype),
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    if config.kind == ADAM:
        return get_megatron_optimizer(settings, [model])
    names = [f.name for f in fields(options) if f.name not in ADAM_OPTIONS]
    rule_options = {name: getattr(options, name) for name in names}
    already_used = CONVERTED if config.rotates else ()
    routing = {name: v for name, v in config.routing.items() if name not in already_used}
    try:
        return get_spectral_megatron_optimizer(settings, [model], **rule_options, **routing)
    except ValueError as error:
        raise config.fail("optimizer", str(error)) from None


def _inner_optimizer(megatron_optimizer: Any) -> Any:
    """Return the torch optimizer inside of Megatron's: one, as the model has no experts."""
    (chained,) = getattr(megatron_optimizer, "chained_optimizers", [megatron_optimizer])
    return chained.optimizer
