"""Uneven inputs under torch's Join: refused at once, with what to write; that works."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from tests.support import harness
from tests.support.weights import values


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def train(model: nn.Module, optimizer: Any, batches: int) -> None:
    for batch in range(batches):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(batch)
        model(torch.randn(2, 8, generator=generator)).square().sum().backward()
        optimizer.step()


def uneven(how: str) -> tuple[str, dict[str, Tensor]]:
    """Rank 1 has one batch more."""
    said = ""
    with quiet():
        model = DistributedDataParallel(model_of())
        source = model.module if how == "alone" else model
        optimizer = spectral_dist.Muon(spectral_dist.param_groups(source), lr=0.02)
        context = (
            model.join()
            if how == "method"
            else Join(
                [model],
                throw_on_early_termination=how == "throw",
                enable=how != "off",
                divide_by_initial_world_size=False,
            )
        )
        try:
            with context:
                train(model, optimizer, 3 + dist.get_rank() * (how != "off"))
        except (ValueError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
        dist.barrier()
    return said, values(model.module)


@pytest.mark.parametrize("how", ["join", "method"])
def test_it_is_refused_before_the_first_step(how: str) -> None:
    before = values(model_of())
    for said, weights in harness.run(2, uneven, how):
        assert said.startswith("ValueError: the model is inside of torch's Join")
        assert "throw_on_early_termination=True" in said
        assert all(torch.equal(weights[name], before[name]) for name in before)


def test_ending_with_the_first_rank() -> None:
    """As many steps as the rank with the fewest inputs has."""
    model = model_of()
    with quiet():
        train(model, spectral_dist.Muon(spectral_dist.param_groups(model), lr=0.02), 3)
    for said, weights in harness.run(2, uneven, "throw"):
        assert said.startswith("RuntimeError")
        for name, value in values(model).items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def test_each_rank_alone() -> None:
    """The last batch has the last rank's gradient alone; both ranks end with its weights."""
    model = model_of()
    with quiet():
        train(model, spectral_dist.Muon(spectral_dist.param_groups(model), lr=0.02), 4)
    for said, weights in harness.run(2, uneven, "alone"):
        assert said == ""
        for name, value in values(model).items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def test_join_that_is_off() -> None:
    for said, _ in harness.run(2, uneven, "off"):
        assert said == ""
