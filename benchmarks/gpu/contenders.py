"""What is compared, by name: ways to X X^T, to Newton-Schulz, and to a whole step.

Symmetric kernels are picked up from ``spectral_dist.polar`` once they are there; until then their
rows say so.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import spectral_dist
from spectral_dist.polar import polar, rows_of
from spectral_dist.polar.scaling import unit_frobenius

Unary = Callable[[Tensor], Any]
TRITON_GEMM = "spectral_dist.polar.triton_gemm"
TRITON_NEWTON_SCHULZ = "spectral_dist.polar.newton_schulz_triton"
STEPS = 5
ROW = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of every step of ``jordan``."""


def attribute(module: str, name: str) -> Any:
    """Return something of a module; None where that is not there.

    What is there and cannot be imported raises when it is called: its row then says why.
    """
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        return partial(_raise, error)


def _raise(error: Exception, *_: Any) -> None:
    raise error


def grams() -> dict[str, Unary | None]:
    """Return ways to X X^T of a batch (k, m, n); None for one that is not there."""
    return {
        "bmm": lambda x: torch.bmm(x, x.mT),
        "symmetric": attribute(TRITON_GEMM, "symmetric_gram"),
    }


def odd_parts() -> dict[str, Unary | None]:
    """Return ways to b R + c R^2 of a batch of symmetric matrices."""
    _, b, c = ROW
    symmetric = attribute(TRITON_GEMM, "symmetric_odd_part")
    return {
        "baddbmm": lambda r: torch.baddbmm(r, r, r, beta=b, alpha=c),
        "symmetric": symmetric and (lambda r: symmetric(r, b, c)),
    }


def newton_schulz(device: torch.device) -> dict[str, Unary | None]:
    """Return ways to the polar factor of a batch (k, m, n) in 5 steps of ``jordan``."""
    return {
        "plain bf16": lambda x: polar(x, method="jordan", compute_dtype=torch.bfloat16),
        "gram fp16": lambda x: polar(x, method="gram_jordan", compute_dtype=torch.float16),
        "symmetric bf16": _triton("standard", "jordan", torch.bfloat16),
        "symmetric gram fp16": _triton("gram", "gram_jordan", torch.float16),
        "torch.optim.Muon": _torch_muon(),
    }


def _triton(name: str, method: str, dtype: torch.dtype) -> Unary | None:
    iterate = attribute(TRITON_NEWTON_SCHULZ, name)
    found = rows_of(method)
    if iterate is None or found is None:
        return None
    rows, safety = found
    return lambda x: iterate(unit_frobenius(x, dtype, safety), rows)


def _torch_muon() -> Unary | None:
    function = attribute("torch.optim._muon", "_zeropower_via_newtonschulz")
    if function is None:
        return None
    return lambda x: function(x[0], ROW, STEPS, 1e-7)


class Pair:
    """Two optimizers that step one after the other."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = [part for part in parts if part.param_groups]

    def step(self) -> None:
        """Step both."""
        for part in self.parts:
            part.step()

    @property
    def state(self) -> dict[Any, Any]:
        """Return the states of both."""
        return {key: value for part in self.parts for key, value in part.state.items()}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups, without the table on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        return spectral_dist.param_groups(model)


def kinds(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices and the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for group in groups(model):
        (matrices if group["kind"] == "matrix" else rest).extend(group["params"])
    return matrices, rest


Build = Callable[[nn.Module], Any]


def _ours(name: str, **options: Any) -> Build:
    return lambda model: getattr(spectral_dist, name)(groups(model), lr=1e-4, **options)


def _adamw(**how: bool) -> Build:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, **how)


def _torch_step(model: nn.Module) -> Pair:
    matrices, rest = kinds(model)
    muon = torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw")
    fused = {"fused": True} if matrices[0].is_cuda else {}
    return Pair(muon, *([torch.optim.AdamW(rest, lr=1e-4, **fused)] if rest else []))


GRAM = {"polar": "gram_jordan", "polar_dtype": "float16"}
OPTIMIZERS: dict[str, Build] = {
    "AdamW fused": _adamw(fused=True),
    "AdamW foreach": _adamw(foreach=True),
    "torch.optim.Muon": _torch_step,
    "Muon": _ours("Muon"),
    "Muon, no finite check": _ours("Muon", check_finite=False),
    "Muon, gram fp16": _ours("Muon", **GRAM),
    "NorMuon": _ours("NorMuon"),
    "ROOT": _ours("ROOT"),
    "SUMO r = 1/4": _ours("SUMO", rank=0.25),
    "PolarGrad, jordan": _ours("PolarGrad", polar="jordan"),
    "PolarGrad": _ours("PolarGrad"),
}
"""Every optimizer by name; the last one's polar factors are QDWH's, in float32."""
