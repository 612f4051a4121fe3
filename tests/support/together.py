"""Small models under two layouts, and what of them a step that fails must leave alone."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist.core.sharded import ShardedOptimizer
from tests.support import harness

MATRIX, BIAS = "1.weight", "3.bias"
LAYOUTS = ("ddp", "fsdp")
BEFORE = 2
"""Good steps before one that fails late."""
WITHIN = 10.0
"""Seconds in which every rank must have raised."""
LIMIT = 90.0
"""Seconds for a whole trial, good steps and their comparison too, on a machine that is busy."""


def plain(width: int = 6, hidden: int = 8) -> nn.Module:
    """Two matrices, and an embedding, biases and a norm for AdamW."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Embedding(7, width), nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, 6)
    )


class OptimizedModel:
    """A model under a layout with an optimizer, on this rank."""

    def __init__(
        self, layout: str, kind: str = "Muon", model: nn.Module | None = None, **options: Any
    ) -> None:
        self.model = model or plain()
        if kind == "POET":
            spectral_dist.poet.convert(self.model, blocks={"^1$": (2, 2), "^3$": (2, 2)})
        if layout == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif layout == "fsdp":
            fully_shard(self.model)
        self.rank = dist.get_rank()
        self.build(kind, **options)

    def build(self, kind: str, routing: dict[str, Any] | None = None, **options: Any) -> None:
        """Make the optimizer, another one if there is one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = spectral_dist.param_groups(self.model, **(routing or {}))
            made = getattr(spectral_dist, kind)(groups, **{"lr": 0.02, **options})
        self.optimizer: ShardedOptimizer = made

    def backward(self, number: int) -> None:
        """Leave the gradients of a step, of this rank's part of its batch."""
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * number + self.rank)
        tokens = torch.randint(7, (5,), generator=generator)
        self.model(tokens).square().sum().backward()

    def step(self, number: int) -> None:
        """Take a step as it should be."""
        self.backward(number)
        self.optimizer.step()

    def parameter(self, name: str) -> nn.Parameter:
        """Return a parameter by its name in the plain model."""
        named = self.model.named_parameters()
        return {n.removeprefix("module."): p for n, p in named}[name]

    def weights(self) -> dict[str, Tensor]:
        """Return what this rank has of every weight."""
        return {name: local(p).clone() for name, p in self.model.named_parameters()}

    def states(self) -> dict[str, Tensor]:
        """Return what this rank has of every state, that of whole matrices too."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = {
            f"{names[p]} {key}": local(value).clone()
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        parts = getattr(self.optimizer, "matrix_parts", list)()
        return {**found, **{f"{p.matrix} {p.name}": p.values.clone() for p in parts}}


def plain_steps(layout: str, count: int, **options: Any) -> OptimizedModel:
    trial = OptimizedModel(layout, **options)
    for number in range(count):
        trial.step(number)
    return trial


def local(tensor: Tensor) -> Tensor:
    """Return what this rank stores."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_kept(
    trial: OptimizedModel, weights: dict[str, Tensor], states: dict[str, Tensor]
) -> None:
    """Assert that nothing has changed since; what states there are now beside those is zero."""
    assert same(trial.weights(), weights)
    for key, value in trial.states().items():
        wanted = states.get(key, torch.zeros_like(value))
        assert torch.equal(value, wanted), f"{key} has changed"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether both have the same bits, those of NaN too."""
    bits = [torch.equal(a[k].nan_to_num(7.7), b[k].nan_to_num(7.7)) for k in a.keys() & b.keys()]
    return a.keys() == b.keys() and all(bits)


@functools.cache
def _apart() -> Any:
    return dist.new_group()


def told(texts: str) -> list[str]:
    """Return every rank's text, by a group that no optimizer uses: all have come this far."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, texts, group=_apart())
    return found


@contextlib.contextmanager
def failing(says: str) -> Iterator[list[BaseException]]:
    """Assert that every rank raises inside, with a text that has ``says`` in it."""
    _apart()
    raised: list[BaseException] = []
    begin = time.monotonic()
    try:
        yield raised
    except BaseException as error:  # torch's CheckpointException is no Exception
        raised.append(error)
    assert time.monotonic() - begin < WITHIN
    texts = told(f"{type(raised[0]).__name__}: {raised[0]}" if raised else "nothing was raised")
    for text in texts:
        assert says in text, texts


def expect_failure(
    trial: OptimizedModel, says: str, act: Callable[[], Any], *, keeps: bool = True
) -> BaseException:
    """Assert that ``act`` raises on every rank and, with ``keeps``, changes nothing."""
    weights, states = trial.weights(), trial.states()
    with failing(says) as raised:
        act()
    if keeps:
        assert_kept(trial, weights, states)
    return raised[0]


def expect(says: str, function: Callable[..., Any], *args: Any, world: int = 2, **kw: Any) -> None:
    """Assert that a function, which examines a failure, ends with it on every rank."""
    for text in harness.run_expecting_errors(world, function, *args, within=LIMIT, **kw):
        assert says in text, text
        assert not text.startswith("AssertionError"), text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
