"""Small matrices on a CPU: one call for many where no bit changes by it, and what that saves."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_dist
from spectral_dist.core import batching
from spectral_dist.polar import batching as polar_batching
from spectral_dist.polar.batching import batch_has_same_bits

BEFORE = {"Muon": 22429, "PolarGrad": 42428, "ROOT": 26829, "SUMO": 37061}
"""Operators that a step of 400 matrices of 8 x 8 dispatched when each was computed alone."""


class Operators(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def optimizer_of(kind: str, count: int, shape: tuple[int, int], **options: Any) -> Any:
    """Return an optimizer of matrices of one shape, which have gradients."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(*shape, bias=False) for _ in range(count))
    with contextlib.redirect_stderr(io.StringIO()):
        groups = spectral_dist.param_groups(model)
    optimizer = getattr(spectral_dist, kind)(groups, lr=0.02, **options)
    give_gradients(optimizer, 0)
    return optimizer


def give_gradients(optimizer: Any, number: int) -> None:
    """Give every matrix a gradient of its own, some of them with null directions."""
    generator = torch.Generator().manual_seed(number)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 7 - 3)
        if i % 3 == 0:
            p.grad[1:3] = p.grad[:1]


@pytest.mark.parametrize("kind", BEFORE)
def test_operators_of_many_small_matrices(kind: str) -> None:
    shape, options = ((16, 16), {"rank": 8}) if kind == "SUMO" else ((8, 8), {})
    optimizer = optimizer_of(kind, 400, shape, **options)
    optimizer.step()
    with Operators() as operators:
        optimizer.step()
    assert sum(operators.calls.values()) <= BEFORE[kind] / 5, operators.calls


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 40), (32, 32)])
@pytest.mark.parametrize("kind", [*BEFORE, "NorMuon"])
@pytest.mark.fast_cases("Muon-shape1", "SUMO-shape2", "ROOT-shape3", "NorMuon-shape0")
def test_bits_do_not_depend_on_the_batch(
    kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices in batches give what each gives alone: as if the trial had failed everywhere."""
    options = {"SUMO": {"period": 2, "rank": 8}, "PolarGrad": {"nu_power": 0.7}}.get(kind, {})
    results = []
    for batched in (True, False):
        if not batched:
            monkeypatch.setattr(polar_batching, "SMALL", 0)
            spectral_dist.polar.api._rounds_alike.cache_clear()
        optimizer = optimizer_of(kind, 90, shape, **options)
        for number in range(4):
            give_gradients(optimizer, number)
            optimizer.step()
        units = [unit for unit in optimizer.all_units if hasattr(unit, "exchange")]
        sizes = {len(which) for unit in units for which, _ in unit.exchange.batches()}
        assert sizes == ({90} if batched else {1})
        results.append([p.detach() for g in optimizer.param_groups for p in g["params"]])
    spectral_dist.polar.api._rounds_alike.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("count", "sizes"), [(128, [128]), (300, [128, 128, 44]), (129, [128, 1])])
def test_many_matrices_are_tried_in_few(
    count: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of as many heads as a large model has would take long."""
    tried: list[int] = []
    original = batching.rounds_alike

    def rounds_alike(rule: Any, options: Any, shape: Any, count: int, dtype: Any) -> bool:
        tried.append(count)
        return original(rule, options, shape, count, dtype)

    monkeypatch.setattr(batching, "rounds_alike", rounds_alike)
    optimizer = optimizer_of("Muon", count, (8, 8))
    optimizer.step()
    (unit,) = [unit for unit in optimizer.all_units if hasattr(unit, "exchange")]
    assert [len(which) for which, _ in unit.exchange.batches()] == sizes
    assert sorted(tried) == sorted(set(sizes) - {1})


def test_a_batch_that_rounds_otherwise_is_refused() -> None:
    """A sum over the batch, a bit that the last place alone sees, a matrix that is too large."""
    shape = (3, 8, 8)

    def alike(compute: Any) -> bool:
        return batch_has_same_bits(compute, shape, torch.float32)

    assert alike(lambda x, places: [x @ x.mT])
    assert not alike(lambda x, places: [x * (1 + 1e-6 * len(x))])
    last = torch.tensor([0.0, 0.0, 2**-22])
    assert not alike(lambda x, places: [x, x * (1 + last[: len(x), None, None])])
    assert not batch_has_same_bits(lambda x, places: [x], (2, 72, 64), torch.float32)
    assert not batch_has_same_bits(lambda x, places: [x], (2, 8, 12), torch.float32)
    assert batch_has_same_bits(lambda x, places: [x], (1, 72, 64), torch.float32)


def test_the_trial_takes_the_rules_own_direction() -> None:
    """A rule of others that mixes the matrices of a batch gets each alone."""
    optimizer = optimizer_of("Muon", 2, (8, 8))
    options = optimizer.rule_options(optimizer.param_groups[0])
    trial = (options, (8, 8), 5, torch.float32)
    assert batching.rounds_alike(optimizer.rule, *trial)

    class Mixing(type(optimizer.rule)):  # type: ignore[misc]
        def direction(self, options: Any, matrices: torch.Tensor, ops: Any) -> torch.Tensor:
            """Return matrices that depend on their neighbours."""
            return matrices - matrices.mean(0)

    assert not batching.rounds_alike(Mixing(), *trial)
