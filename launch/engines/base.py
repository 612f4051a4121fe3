"""Define what the training loop calls: the base class of all engines."""

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
    """A model and its optimizer, under one training framework.

    Attributes:
        kind: the optimizer's type in the configuration.
        llama: the LlamaConfig that the model was built from.
        model: what computes the forward: DeepSpeed's engine, DDP, or the model itself.
        optimizer: the innermost one: a ``SpectralOptimizer`` or the framework's Adam.
        batch: rows per step, over all ranks.
        micro: rows per micro-batch on each rank.
        data_rank, data_ranks: this rank's index among those that divide the batch, and their
            number; ranks of one tensor-parallel group have the same index and see the same rows.
        device: of the model and its inputs.
    """

    kind: str
    llama: Any
    model: Any
    optimizer: Any
    batch: int
    micro: int
    data_rank: int
    data_ranks: int
    device: torch.device

    def logits(self, tokens: Tensor) -> Tensor:
        """Compute the logits of tokens; under ZeRO-3 a collective call.

        Args:
            tokens: (rows, length).

        Returns:
            float32, (rows, length, vocabulary).
        """
        out: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return out.float()

    def losses(self, rows: Tensor) -> Tensor:
        """Compute the loss in nats of each predicted token.

        Args:
            rows: tokens, (rows, length + 1).

        Returns:
            (rows, length)
        """
        targets = rows[:, 1:].to(self.device)
        logits = self.logits(rows[:, :-1])
        nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view_as(targets)

    @abstractmethod
    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Run forward and backward of one micro-batch.

        Args:
            rows: tokens, (rows, length + 1).
            last: whether it is the step's last micro-batch, after which gradients are reduced.

        Returns:
            The mean loss, detached.
        """

    @abstractmethod
    def step(self) -> None:
        """Step the optimizer and the schedule, after the last micro-batch."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """Return the first group's learning rate for the next step."""

    @abstractmethod
    def write(self, target: Path) -> None:
        """Write a checkpoint into the existing folder ``target``; all ranks call this."""

    @abstractmethod
    def read(self, source: Path) -> None:
        """Restore what ``write`` has written; all ranks call this.

        Raises:
            ValueError: another engine has written it.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change, as JSON."""

    @property
    def skipped_steps(self) -> int:
        """Return how many steps of the run the framework has skipped; equal on all ranks."""
        return 0

    def watch(self, write: Callable[[int, Report], None]) -> None:
        """Have the optimizer's monitor, if there is one, call ``write`` with (step, report)."""
        monitor = getattr(self.optimizer, "monitor", None)
        if monitor is not None:
            monitor.sinks.append(write)

    @property
    def num_parameters(self) -> int:
        """Return the number of weights of the whole model, without the parameters that POET adds.

        The model that POET's is exported as has the same number.
        """
        layers = [m for m in self.model.modules() if isinstance(m, PoetLayer)]
        added = {id(skew) for layer in layers for skew in layer.skews.values()}
        return sum(_numel(p) for p in self.model.parameters() if id(p) not in added)

    @property
    def num_trained(self) -> int:
        """Return the number of elements that have a gradient."""
        return sum(_numel(p) for p in self.model.parameters() if p.requires_grad)

    def state_bytes(self) -> int:
        """Return the bytes of optimizer state that this rank holds."""
        storages = {}
        states: list[Any] = [dict(self.optimizer.state)]
        if isinstance(self.optimizer, SpectralOptimizer):
            states.append(self.optimizer.matrix_state())
        for tensor in _tensors(states):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def comm_bytes(self) -> int:
        """Return the bytes that this rank's optimizer has sent in exchanges since it was built."""
        return int(getattr(self.optimizer, "comm_bytes", 0))

    def polar_calls(self) -> int:
        """Return how many matrices this rank has orthogonalized since its optimizer was built."""
        return int(getattr(self.optimizer, "polar_calls", 0))


def _numel(parameter: Tensor) -> int:
    """Return the number of elements of a whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
