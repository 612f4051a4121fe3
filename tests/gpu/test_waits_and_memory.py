"""What a step waits for, and what memory it takes for a moment: counted by CUDA itself."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import nn

from spectral_dist.core import finite
from spectral_dist.core.units import MatrixUnit
from tests.gpu import support
from tests.support.memory.formula import FLOAT, step_peak

pytestmark = pytest.mark.gpu
SIDE, MATRICES, BUCKET_MB = 512, 12, 4
RULES = {
    "Muon": "muon",
    "ROOT": "root",
    "PolarGrad": "polargrad by products",
    "SUMO": "sumo refresh",
}
"""The name that the formula has for each rule (a step of SUMO that refreshes is the larger)."""


@pytest.mark.parametrize("name", support.OPTIONS)
@pytest.mark.parametrize("options", [{}, {"check_finite": False}], ids=["default", "unchecked"])
def test_steps_two_and_three_wait_for_nothing(name, options, gpu, capsys):
    model, optimizer = support.build(name, gpu, **options)
    support.take_steps(model, optimizer, 0, 1)
    for step in (1, 2):
        support.give_gradients(model, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        except RuntimeError as error:
            frames = traceback.extract_tb(error.__traceback__)
            with capsys.disabled():
                line = next(f for f in reversed(frames) if "tests" not in f.filename)
                ours = [f for f in frames if "spectral_dist/" in f.filename]
                line = ours[-1] if ours else line
                where = f"{line.filename.rpartition('spectral_dist/')[2]}:{line.lineno}"
                print(f"\n{name} {options or ''} waits in step {step + 1}: {where} {line.line}")
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", support.OPTIONS)
def test_a_bad_gradient_changes_nothing_and_is_told_by_the_next_step(name, device, monkeypatch):
    """Bit by bit; the host's counts are right again once it has looked."""
    monkeypatch.setattr(finite, "LATER_ON", (device.type,))
    model, optimizer = support.build(name, device)
    support.take_steps(model, optimizer, 0, 1)
    before = support.everything(model, optimizer)
    support.give_gradients(model, 1)
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = float("nan")
    if name != "POET":  # it merges in this step, and looks first
        optimizer.step()
        support.give_gradients(model, 1)
    with pytest.raises(ValueError, match="in the last step, which was not applied: the gradient"):
        optimizer.step()
    assert support.same(support.everything(model, optimizer), before)
    support.take_steps(model, optimizer, 1, 3)
    again, other = support.build(name, device)
    support.take_steps(again, other, 0, 3)
    assert support.same(support.everything(model, optimizer), support.everything(again, other))


def peak_of(name, count, gpu):
    """Bytes that a third step takes over what was there, and the optimizer."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(count)).to(gpu)
    options = {} if name == "SUMO" else {"polar_dtype": "float32"}
    optimizer = support.optimizer_of(name, model, bucket_mb=BUCKET_MB, **options)
    support.take_steps(model, optimizer, 0, 2)  # cuBLAS takes its work space once
    support.give_gradients(model, 2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, optimizer


def bound_of(name, optimizer):
    """Bytes, by the formula of a step's temporaries."""
    routes = [
        route
        for unit in optimizer.all_units
        if isinstance(unit, MatrixUnit)
        for route in unit.exchange.routes
    ]
    most = {
        "gives": max(sum(p.length for p in route.send_runs) for route in routes),
        "takes": max(sum(route.recv_counts) for route in routes),
        "returns": max(sum(p.length for p in route.result_runs) for route in routes),
        "moves": int(any(route.moves for route in routes)),
    }
    return FLOAT * step_peak(RULES[name], most, 1, SIDE, SIDE // 4)


@pytest.mark.parametrize("name", RULES)
def test_a_step_takes_a_few_buckets_for_a_moment(name, gpu):
    peak, optimizer = peak_of(name, MATRICES, gpu)
    bound = bound_of(name, optimizer)
    slack = 2 * 2**20  # flags, index lists and the allocator's rounding
    print(f"{name}: {peak / 2**20:.1f} MiB of {bound / 2**20:.1f}")
    assert peak <= bound + slack, (peak, bound)


@pytest.mark.parametrize("name", ["Muon", "ROOT", "PolarGrad"])
def test_a_model_of_twice_as_many_matrices_takes_no_more(name, gpu):
    few, _ = peak_of(name, MATRICES, gpu)
    many, _ = peak_of(name, 2 * MATRICES, gpu)
    assert many <= few + 2**20, (few, many)


@pytest.mark.parametrize("name", support.OPTIONS)
def test_memory_does_not_grow_from_step_to_step(name, gpu):
    model, optimizer = support.build(name, gpu)
    support.take_steps(model, optimizer, 0, 4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    support.take_steps(model, optimizer, 4, 8)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
