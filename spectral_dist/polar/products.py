"""How Newton-Schulz multiplies where the result is symmetric: all by torch, or half by Triton.

Which of them it is depends on the matrices, by a table of measurements, unless a user has chosen.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist._log import logger

CHOICES = ("auto", "torch", "triton")
VARIABLE = "SPECTRAL_DIST_POLAR_PRODUCTS"
HALF = (torch.float16, torch.bfloat16)
SHORTEST = {(9, 0): 4096}
"""Compute capability -> the shortest side from which "auto" takes Triton, in half precision.

Measured on one NVIDIA H100 80GB (9.0), torch 2.11, Triton 3.6, with 5 steps of ``jordan`` in bf16,
torch's time over Triton's: 1.35 at 4096 x 4096, 1.33 at 7168 x 6144, 1.18 at 3072 x 3584, .96 at
2048 x 2048; ``gram_jordan`` in float16: 1.37, 1.48, 1.20, .95. Whole calls of ``polar``, measured
apart: 1.22, 1.30 and 1.01, so 3072 is left to torch. float32 took longer at all sizes.
"""
ALIGNED = 8
"""Sides are a multiple of this where rows in half precision begin at 16 bytes, as TMA needs it."""


class Products(NamedTuple):
    """The three products of Newton-Schulz that are symmetric.

    All take batches, write their result into their last argument, which is none of the operands,
    and return it. R and Z are (k, s, s).

    Attributes:
        gram: (x, out) -> X X^T, or X^T X for tall X; x (k, m, n).
        odd_part: (r, b, c, out) -> b R + c R^2, c not 0.
        update: (r, z, a, out) -> a R + Z R of R and Z that commute, as polynomials of one matrix
            do.
    """

    gram: Callable[[Tensor, Tensor], Tensor]
    odd_part: Callable[[Tensor, float, float, Tensor], Tensor]
    update: Callable[[Tensor, Tensor, float, Tensor], Tensor]


def _gram(x: Tensor, out: Tensor) -> Tensor:
    if x.shape[-2] > x.shape[-1]:
        return torch.bmm(x.mT, x, out=out)
    return torch.bmm(x, x.mT, out=out)


def _odd_part(r: Tensor, b: float, c: float, out: Tensor) -> Tensor:
    return torch.baddbmm(r, r, r, beta=b, alpha=c, out=out)


def _update(r: Tensor, z: Tensor, a: float, out: Tensor) -> Tensor:
    return torch.baddbmm(r, z, r, beta=a, out=out)


TORCH = Products(_gram, _odd_part, _update)

_chosen: str | None = None


@explained
def set_products(which: str) -> None:
    """Choose how symmetric products of Newton-Schulz are computed in this process from now on.

    The environment variable SPECTRAL_DIST_POLAR_PRODUCTS says it until this is called, for whoever
    launches a script of others. The results differ by rounding alone.

    Args:
        which: "auto", the default: half of each product by Triton where that was measured to be
            faster (see ``SHORTEST``) and the package triton is installed, else all of it by torch.
            "torch": always torch. "triton": Triton wherever the iteration is in float16 or
            bfloat16, whatever the size; float32 and float64 are torch's.

    Raises:
        ValueError: ``which`` is none of these, or "triton" without the package. ``polar`` raises
            it where "triton" has no kernels for the device: they are for NVIDIA GPUs from 8.0 on.
    """
    global _chosen
    _chosen = _checked(which, "set_products")


def choice() -> str:
    """Return what the user has chosen, "auto" if nothing.

    Raises:
        ValueError: the environment variable has no such value, or "triton" without the package.
    """
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _checked(which: str, source: str) -> str:
    """Return a choice that is possible.

    Args:
        which: what the user wrote.
        source: where, for the error.
    """
    if which not in CHOICES:
        raise ValueError(f"{source}: {which!r} is unknown; write 'auto', 'torch' or 'triton'")
    if which == "triton" and not _has_triton():
        raise ValueError(
            f"{source}: 'triton' needs the package triton, which is not installed; write 'auto',"
            " or pip install 'spectral-dist[triton]'"
        )
    return which


def products_for(short: int, dtype: torch.dtype, device: torch.device) -> Products:
    """Return how to multiply in an iteration.

    Args:
        short: the short side of the matrices.
        dtype: of the iteration.
        device: of the matrices.

    Raises:
        ValueError: the user chose "triton", and it has no kernels for the device.
    """
    which = choice()
    if which == "torch":
        return TORCH
    if which == "auto":
        shortest = SHORTEST.get(_capability(device), math.inf)
        # torch.compile would compile the kernels anew, by rules of its own
        is_faster = dtype in HALF and short >= shortest and not torch.compiler.is_compiling()
        return _triton() if is_faster and _works(device) else TORCH
    from spectral_dist.polar import triton_gemm

    if not (triton_gemm.INTERPRETED or _capability(device) >= (8, 0)):
        raise ValueError(
            f"the products of polar factors are to be 'triton', which has no kernels for {device}:"
            " they are for NVIDIA GPUs from compute capability 8.0 on; write 'auto'"
        )
    return _triton() if dtype in HALF else TORCH


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, (0, 0) of any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@lru_cache
def _works(device: torch.device) -> bool:
    """Return whether Triton is there and can compile for a GPU, which needs a C compiler, too.

    What fails is logged: nobody has asked for Triton.
    """
    if not _has_triton():
        return False
    try:
        x = torch.zeros(1, 128, 128, dtype=torch.bfloat16, device=device)
        _triton().gram(x, torch.empty_like(x))
    except Exception as error:  # of a compiler, a linker, a driver
        logger.warning(
            "Triton is installed but does not work, so that products of polar factors are torch's:"
            " %s: %s", type(error).__name__, error,
        )  # fmt: skip
        return False
    return True


@lru_cache
def _has_triton() -> bool:
    """Return whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


@lru_cache
def _triton() -> Products:
    """Return Triton's products; Triton is imported when they are first needed."""
    from spectral_dist.polar import triton_gemm

    return Products(triton_gemm.gram, triton_gemm.odd_part, triton_gemm.update)
