"""What takes a contender's iterations on one rank, under torch's layouts."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.models import Form
from tests.support.memory.live import distinct_bytes


class Runner:
    """A contender's model and optimizer on this rank.

    Subclasses say what a forward and backward, a step, whole matrices and the state are.
    """

    def forward_and_backward(self, tokens: Tensor) -> None:
        """Leave gradients of the loss of ``tokens``."""
        raise NotImplementedError

    def step(self) -> None:
        """Change the weights."""
        raise NotImplementedError

    def whole(self) -> dict[str, Tensor]:
        """Return copies of all matrices, unsharded; every rank calls it."""
        raise NotImplementedError

    def state(self) -> Any:
        """Return the optimizer's state, nested."""
        raise NotImplementedError

    def own_polar(self) -> int:
        """Return how many matrices it says that it has orthogonalized; 0 if it does not say."""
        return 0

    def iterate(self, tokens: Tensor, around: Any = None) -> tuple[float, float]:
        """Take an iteration.

        Args:
            tokens: the same on every rank, so that gradients are those of one process.
            around: context of the step.

        Returns:
            Seconds of the iteration and of its step, each from barrier to barrier.
        """
        dist.barrier()
        begin = time.perf_counter()
        self.forward_and_backward(tokens)
        dist.barrier()
        middle = time.perf_counter()
        with around or contextlib.nullcontext():
            self.step()
        dist.barrier()
        end = time.perf_counter()
        return end - begin, end - middle

    def state_bytes(self) -> int:
        """Return the bytes of the optimizer's state on this rank."""
        found = [t for t in tree_leaves(self.state()) if isinstance(t, Tensor)]
        return distinct_bytes([t.to_local() if isinstance(t, DTensor) else t for t in found])


class TorchRunner(Runner):
    """Under FSDP2 or DistributedDataParallel."""

    def __init__(self, name: str, layout: str, form: Form) -> None:
        contender = CONTENDERS[name]
        self.wrapped = contender.wrapped(form, layout)
        self.optimizer = contender.build(self.wrapped)

    @override
    def forward_and_backward(self, tokens: Tensor) -> None:
        self.wrapped.model.zero_grad()
        self.wrapped.model(tokens).backward()

    @override
    def step(self) -> None:
        self.optimizer.step()

    @override
    def whole(self) -> dict[str, Tensor]:
        return self.wrapped.whole()

    @override
    def state(self) -> Any:
        matrix_state = getattr(self.optimizer, "matrix_state", dict)()
        return [dict(s) for s in self.optimizer.state.values()], matrix_state

    @override
    def own_polar(self) -> int:
        return getattr(self.optimizer, "polar_calls", 0)
