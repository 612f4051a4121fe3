"""DeepSpeed, and torch_engine.py and megatron_engine.py, behind what a training loop calls."""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.launch import llama
from spectral_dist.launch.ranks import Ranks
from spectral_dist.monitor import Report
from spectral_dist.poet.layer import PoetLayer

State = dict[str, Any]


class Engine(ABC):
    """A model and its optimizer: `batch` rows per step, in micro-batches of `micro` per rank.

    Ranks of the same `data_rank`, of `data_ranks`, see the same rows: those of tensor parallelism.
    """

    kind: str
    model: Any  # what is called: DeepSpeed's engine, DDP, or the model itself
    optimizer: Any  # the innermost one: ours, or torch.optim.AdamW
    batch: int
    micro: int
    data_rank: int
    data_ranks: int
    device: torch.device

    def logits(self, tokens: Tensor) -> Tensor:
        """(rows, length) -> float32 (rows, length, vocabulary); under ZeRO-3 a collective call."""
        out: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return out.float()

    def losses(self, rows: Tensor) -> Tensor:
        """(rows, length + 1) -> the loss in nats of each predicted token, (rows, length)."""
        targets = rows[:, 1:].to(self.device)
        logits = self.logits(rows[:, :-1])
        nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view_as(targets)

    @abstractmethod
    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, detached."""

    @abstractmethod
    def step(self) -> None:
        """Optimizer and schedule, once the last micro-batch is done."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """The first group's learning rate, for the step to come."""

    @abstractmethod
    def save(self, folder: Path, step: int, state: State) -> None:
        """Checkpoint everything into `folder`; on all ranks."""

    @abstractmethod
    def load(self, folder: Path) -> State:
        """Restore the newest checkpoint in `folder`; the `state` it was saved with. ValueError."""

    def watch(self, write: Callable[[int, Report], None]) -> None:
        """Hand the optimizer's reports on matrices to `write`, if it makes any."""
        monitor = getattr(self.optimizer, "monitor", None)
        if monitor is not None:
            monitor.sinks.append(write)

    @property
    def parameters(self) -> int:
        """Numbers in the whole model, and in the one that POET's is exported as."""
        layers = [m for m in self.model.modules() if isinstance(m, PoetLayer)]
        added = {id(skew) for layer in layers for skew in layer.skews.values()}
        return sum(_numel(p) for p in self.model.parameters() if id(p) not in added)

    @property
    def trained(self) -> int:
        """Numbers that have a gradient."""
        return sum(_numel(p) for p in self.model.parameters() if p.requires_grad)

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""
        storages = {}
        kept: list[Any] = [dict(self.optimizer.state)]
        if isinstance(self.optimizer, SpectralOptimizer):
            kept.append(self.optimizer.matrix_state())
        for tensor in _tensors(kept):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def comm_bytes(self) -> int:
        """Bytes this rank's optimizer has sent in exchanges of its own since it was made."""
        return int(getattr(self.optimizer, "comm_bytes", 0))

    def polar_calls(self) -> int:
        """Matrices this rank has orthogonalized since its optimizer was made."""
        return int(getattr(self.optimizer, "polar_calls", 0))


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 empties it


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def name_latest(checkpoint: Path) -> None:
    """Make it the one that ``latest`` finds: last, so that it is never one that is not whole."""
    new = checkpoint.with_name("latest.new")
    new.write_text(checkpoint.name, encoding="utf-8")
    new.replace(checkpoint.with_name("latest"))


def latest(folder: Path) -> Path:
    """The newest checkpoint in the folder. ValueError: none is named."""
    if not (folder / "latest").is_file():
        raise ValueError(f"no checkpoint to resume in {folder}")
    return folder / (folder / "latest").read_text(encoding="utf-8").strip()


def prepare_deepspeed() -> Any:
    """The deepspeed module, set up for this machine."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    from spectral_dist.integrations.deepspeed._compat import without_compiling

    logger.setLevel("WARNING")
    # DeepSpeed calls what torch 2.13 renamed; nobody here can do anything about it.
    warnings.filterwarnings("ignore", r".*is deprecated. Please use", FutureWarning)
    if deepspeed.get_accelerator().device_name() == "cpu":
        without_compiling()
    return deepspeed


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file. ValueError: unreadable, or without an optimizer."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the DeepSpeed configuration {path}: {error}") from None
    if not isinstance(config, dict) or "type" not in config.get("optimizer", {}):
        raise ValueError(f'{path}: expected an object with "optimizer": {{"type": ...}}')
    return config


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` with the user's JSON, as it is."""

    def __init__(self, config: Path, model: Any, seed: int, ranks: Ranks, zero_init: bool) -> None:
        """`model` is a LlamaConfig. With `zero_init` the whole model never exists on one rank."""
        fields = read_deepspeed_config(config)
        self.kind = fields["optimizer"]["type"]
        stage = fields.get("zero_optimization", {}).get("stage", 0)
        if zero_init and stage != 3:
            raise ValueError(f"--zero-init needs ZeRO stage 3; {config} asks for stage {stage}")
        deepspeed = prepare_deepspeed()
        if self.kind.lower().startswith("spectral"):
            import spectral_dist.integrations.deepspeed  # noqa: F401  registers the name
        under = deepspeed.zero.Init(config_dict_or_path=str(config)) if zero_init else None
        built = llama.build(model, seed, under)
        self.model, *_ = deepspeed.initialize(model=built, config=str(config))
        self.engine: Any = self.model
        self.optimizer = self.engine.basic_optimizer
        self.batch = self.engine.train_batch_size()
        self.micro = self.engine.train_micro_batch_size_per_gpu()
        self.device, self.data_rank, self.data_ranks = ranks.device, ranks.rank, ranks.world

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, detached."""
        loss = self.losses(rows).mean()
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # no step yet: DeepSpeed counts micro-batches in it
        return loss.detach()

    def step(self) -> None:
        """Optimizer and schedule, once the last micro-batch is done."""
        assert self.engine.is_gradient_accumulation_boundary()
        self.engine.step()

    @property
    def lr(self) -> float:
        """The first group's learning rate, for the step to come."""
        return float(self.engine.get_lr()[0])

    def save(self, folder: Path, step: int, state: State) -> None:
        """Checkpoint everything into `folder`; on all ranks."""
        self.engine.save_checkpoint(str(folder), tag=f"step_{step:06d}", client_state=state)

    def load(self, folder: Path) -> State:
        """Restore the newest checkpoint in `folder`; the `state` it was saved with. ValueError."""
        path, state = self.engine.load_checkpoint(str(folder))
        if path is None:
            raise ValueError(f"no checkpoint to resume in {folder}")
        return dict(state)
