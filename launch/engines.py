"""DeepSpeed and plain torch behind the few calls that a training loop needs."""

from __future__ import annotations

import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectral_dist.launch import llama
from spectral_dist.launch.ranks import Ranks

State = dict[str, Any]


class Engine(ABC):
    """A model and its optimizer: `batch` rows per step, in micro-batches of `micro` per rank."""

    kind: str
    model: Any  # what is called: DeepSpeed's engine, DDP, or the model itself
    optimizer: Any  # the innermost one: ours, or torch.optim.AdamW
    batch: int
    micro: int
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

    @property
    def parameters(self) -> int:
        """Numbers in the whole model."""
        sizes = (getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        return sum(sizes)

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""
        storages = {}
        for tensor in _tensors(dict(self.optimizer.state)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def comm_bytes(self) -> int:
        """Bytes this rank's optimizer has sent in exchanges of its own since it was made."""
        return int(getattr(self.optimizer, "comm_bytes", 0))

    def polar_calls(self) -> int:
        """Matrices this rank has orthogonalized since its optimizer was made."""
        return int(getattr(self.optimizer, "polar_calls", 0))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def prepare_deepspeed() -> Any:
    """The deepspeed module, set up for this machine."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls what torch 2.13 renamed; nobody here can do anything about it.
    warnings.filterwarnings("ignore", r".*is deprecated. Please use", FutureWarning)
    if deepspeed.get_accelerator().device_name() == "cpu":
        # It would be compiled at every first start (45 s), to speed up what gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
        self.device = ranks.device

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


@dataclass(frozen=True)
class TorchOptions:
    """What a DeepSpeed JSON would say."""

    optimizer: str  # muon or adamw
    lr: float
    momentum: float
    weight_decay: float
    clip: float
    batch: int
    micro: int
    warmup: int
    steps: int


class TorchEngine(Engine):
    """One process, or DistributedDataParallel; linear warmup, then a cosine to a tenth."""

    def __init__(self, options: TorchOptions, model: Any, seed: int, ranks: Ranks) -> None:
        """`model` is a LlamaConfig."""
        self.kind = options.optimizer
        self.batch, self.micro, self.clip = options.batch, options.micro, options.clip
        if self.batch % (self.micro * ranks.world):
            raise ValueError(
                f"--batch {self.batch} is no multiple of --micro-batch {self.micro} "
                f"times {ranks.world} rank(s)"
            )
        self.device, self.ranks = ranks.device, ranks
        self.module = llama.build(model, seed).to(ranks.device)
        self.model = self.module
        if ranks.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.module)
        self.optimizer = _torch_optimizer(options, self.module, ranks)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(step, options.warmup, options.steps)
        )

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss, detached."""
        ddp = isinstance(self.model, nn.parallel.DistributedDataParallel)
        with self.model.no_sync() if ddp and not last else nullcontext():
            loss = self.losses(rows).mean()
            (loss * (self.micro * self.ranks.world / self.batch)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        """Optimizer and schedule, once the last micro-batch is done."""
        if self.clip > 0:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()

    @property
    def lr(self) -> float:
        """The first group's learning rate, for the step to come."""
        return float(self.optimizer.param_groups[0]["lr"])

    def save(self, folder: Path, step: int, state: State) -> None:
        """Checkpoint everything into `folder`; on all ranks."""
        target = folder / f"step_{step:06d}"
        target.mkdir(parents=True, exist_ok=True)
        # Each rank's own: an optimizer may keep a matrix's state at its owner only.
        torch.save(self.optimizer.state_dict(), target / f"optimizer_{self.ranks.rank}.pt")
        if self.ranks.first:
            common = {"state": state, "world": self.ranks.world}
            common |= {"scheduler": self.scheduler.state_dict(), "model": self.module.state_dict()}
            torch.save(common, target / "model.pt")
        dist.barrier()
        if self.ranks.first:  # last, so that it never names a checkpoint that is not whole
            (folder / "latest.new").write_text(target.name, encoding="utf-8")
            (folder / "latest.new").replace(folder / "latest")

    def load(self, folder: Path) -> State:
        """Restore the newest checkpoint in `folder`; the `state` it was saved with. ValueError."""
        if not (folder / "latest").is_file():
            raise ValueError(f"no checkpoint to resume in {folder}")
        source = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        common = torch.load(source / "model.pt", map_location=self.device, weights_only=True)
        if common["world"] != self.ranks.world:
            raise ValueError(
                f"{source} was saved by {common['world']} rank(s), and --engine torch resumes on "
                f"as many, not on {self.ranks.world}"
            )
        self.module.load_state_dict(common["model"])
        self.scheduler.load_state_dict(common["scheduler"])
        mine = source / f"optimizer_{self.ranks.rank}.pt"
        self.optimizer.load_state_dict(
            torch.load(mine, map_location=self.device, weights_only=True)
        )
        return dict(common["state"])


def schedule(step: int, warmup: int, steps: int) -> float:
    """The factor on the learning rate at `step` (from 0): up over `warmup`, then down to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def _torch_optimizer(options: TorchOptions, module: nn.Module, ranks: Ranks) -> Any:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(
            module.parameters(),
            lr=options.lr,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
        )
    import spectral_dist

    return spectral_dist.Muon(
        spectral_dist.param_groups(module),
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        process_group=dist.group.WORLD if ranks.world > 1 else None,
    )
