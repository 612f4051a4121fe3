"""What is compared, by name: ways to X X^T, to Newton-Schulz, and to a whole step.

Symmetric products and CUDA graphs are the library's, by its own switches; the rows of what a device
does not have say so.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import spectral_dist
from spectral_dist.polar import set_graphs, set_products
from spectral_dist.polar.products import Products, products_for

Unary = Callable[[Tensor], Any]
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


@contextlib.contextmanager
def switched(products: str = "auto", graphs: bool = False) -> Iterator[None]:
    """Set the library's switches for polar factors, and set them back."""
    set_products(products)
    set_graphs(graphs)
    try:
        yield
    finally:
        set_products("auto")
        set_graphs(False)


def has_kernels(device: torch.device) -> bool:
    """Return whether there are symmetric products by Triton on a device."""
    try:
        with switched("triton"):
            products_for(64, torch.bfloat16, device)
    except ValueError:
        return False
    return True


def _symmetric(device: torch.device) -> Products | None:
    """Return the symmetric products by Triton."""
    if not has_kernels(device):
        return None
    with switched("triton"):
        return products_for(64, torch.bfloat16, device)


def grams(device: torch.device) -> dict[str, Unary | None]:
    """Return ways to X X^T of a batch (k, n, n); None for one that is not there."""
    ours = _symmetric(device)
    return {
        "bmm": lambda x: torch.bmm(x, x.mT),
        "symmetric": ours and (lambda x: ours.gram(x, torch.empty_like(x))),
    }


def odd_parts(device: torch.device) -> dict[str, Unary | None]:
    """Return ways to b R + c R^2 of a batch of symmetric matrices."""
    _, b, c = ROW
    ours = _symmetric(device)
    return {
        "baddbmm": lambda r: torch.baddbmm(r, r, r, beta=b, alpha=c),
        "symmetric": ours and (lambda r: ours.odd_part(r, b, c, torch.empty_like(r))),
    }


BF16: dict[str, Any] = {"method": "jordan", "compute_dtype": "bfloat16"}
GRAM_FP16: dict[str, Any] = {"method": "gram_jordan", "compute_dtype": "float16"}
FORMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "plain bf16": ("torch", False, BF16),
    "gram fp16": ("torch", False, GRAM_FP16),
    "symmetric bf16": ("triton", False, BF16),
    "symmetric gram fp16": ("triton", False, GRAM_FP16),
    "plain bf16, CUDA graph": ("torch", True, BF16),
    "symmetric bf16, CUDA graph": ("triton", True, BF16),
    "default bf16": ("auto", False, BF16),
}
"""Name -> products and graphs of ``switched``, options of ``polar``: 5 steps of ``jordan``."""


def torch_muon() -> Unary | None:
    """Return the polar factor as torch.optim.Muon computes it; None if it is not there."""
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
