"""What a training loop calls: the engine that the others are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.monitor import Report
from spectral_dist.poet.layer import PoetLayer


class Engine(ABC):
    """A model and its optimizer: `batch` rows per step, in micro-batches of `micro` per rank.

    Ranks of the same `data_rank`, of `data_ranks`, see the same rows: those of tensor parallelism.
    """

    kind: str
    llama: Any  # the LlamaConfig that the model was built from
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
    def write(self, target: Path) -> None:
        """Checkpoint everything into the folder `target`, which is there; on all ranks."""

    @abstractmethod
    def read(self, source: Path) -> None:
        """Restore what `write` has written; on all ranks. ValueError: it was another engine."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from; JSON."""

    @property
    def skipped_steps(self) -> int:
        """Steps, since the run began, that a framework has left out; equal on all ranks."""
        return 0

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
