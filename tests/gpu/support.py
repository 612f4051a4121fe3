"""What the tests on a GPU share: a small model, gradients that depend on the step, optimizers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_dist
from spectral_dist import poet
from tests.support import models

WIDTH, HIDDEN, BLOCK = 64, 168, 8
BLOCKS = {r"layers\.1\.up": (8, 173), r"layers\.1\.down": (173, 8)}
"""The second layer is 173 wide, which has no blocks of 8."""
OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {},
    "PolarGrad": {},
    "ROOT": {},
    "SUMO": {"rank": 0.25, "period": 2},
    "NorMuon": {},
    "POET": {"merge_every": 2},
}
"""Every optimizer, with a refresh or a merge within three steps."""
MATRICES = [name for name in OPTIONS if name != "POET"]
FLOAT = {"polar_dtype": "float32", "wire_dtype": "float32"}


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on the CPU: embedding, two layers, head; biases and norms."""
    return models.build(odd=False, width=WIDTH, hidden=HIDDEN).to(dtype)


def build(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    """The model on a device, converted if it is to be, and its optimizer."""
    model = plain(dtype)
    if name == "POET":
        poet.convert(model, block=BLOCK, blocks=BLOCKS)
    model.to(device)
    return model, optimizer_of(name, model, **options)


def optimizer_of(name: str, model: nn.Module, **options: Any) -> Any:
    """An optimizer of a model that is where it is to be."""
    with contextlib.redirect_stderr(io.StringIO()):
        groups = spectral_dist.param_groups(model)
    if name in ("SUMO", "POET"):
        options.pop("polar_dtype", None)
    if name == "POET":
        options.pop("wire_dtype", None)
    given = {"lr": 0.02, "scalar_lr": 0.005, **OPTIONS[name], **options}
    return getattr(spectral_dist, name)(groups, **given)


def give_gradients(model: nn.Module, step: int) -> None:
    """Random gradients of a step, the same on every device and in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(500 + step)
    for p in model.parameters():
        if p.requires_grad:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = g.to(p.device, p.dtype)


def take_steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Steps on the gradients of ``give_gradients``."""
    for step in range(first, last):
        give_gradients(model, step)
        optimizer.step()


def train(model: Any, optimizer: Any, device: torch.device, steps: int = 3) -> None:
    """Steps on the model's own loss; tokens depend on the step."""
    for step in range(steps):
        model(models.tokens(step).to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def everything(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Copies of all that a step may change, in one order."""
    tensors = [p.detach() for p in model.parameters()]
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            tensors += [state[key] for key in sorted(state) if isinstance(state[key], Tensor)]
    if hasattr(optimizer, "matrix_parts"):
        tensors += [part.values for part in optimizer.matrix_parts()]
    return [t.detach().clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all bits are equal."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """The largest error of a parameter's change, over the norm of the change; NaN never passes."""
    assert found.keys() == wanted.keys()
    errors = []
    for name, value in wanted.items():
        start = before[name].double().cpu()
        change = value.double().cpu() - start
        error = (found[name].double().cpu() - start - change).norm()
        errors.append(float(error / change.norm().clamp_min(1e-12)))
    assert all(error == error for error in errors)
    return max(errors)


def need(module: str) -> None:
    """Skip a test where a package is missing, and say which."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
