"""SUMO's bases: the top r left singular vectors of gradients, or nearly those.

On a GPU nothing waits for the device (but in ``svd``): there are no eigendecompositions, whose
place ``gram_root`` takes, and no copies of sketches and of lists of indices from the host.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_dist.polar import gram_root
from spectral_dist.rules.base import MatrixOps

OVERSAMPLING = 8
"""Number of columns of the sketch beyond the rank."""
POWER_STEPS = 2
"""How many times a sketch Y is replaced by G G^T Y."""
MORE_POWER_STEPS, FEW = 3, 32
"""The same without oversampling; a rank up to ``FEW`` has FEW // r steps more."""


@dataclass(frozen=True)
class Due:
    """The matrices of a batch that get a new basis.

    Attributes:
        places: their indices in the batch, ascending.
        rank: r, the number of columns of a basis.
        seeds: a text for each matrix, on which alone its sketch depends.
    """

    places: Sequence[int]
    rank: int
    seeds: Sequence[str]


def randomized(g: Tensor, due: Due, ops: MatrixOps) -> Tensor:
    """Return a basis from a sketch and power steps; the sketch is the same on every rank.

    Halko, Martinsson, Tropp 2011, 4.4.

    Args:
        g: gradients of the matrices that are due, (j, slab of m, n).
        due: these matrices.
        ops: the operations on whole matrices.

    Returns:
        Nearly the top r left singular vectors, (j, slab of m, r).
    """
    return (_oversampled if gram_root.may_wait(g) else _of_r_columns)(g, due, ops)


def _oversampled(g: Tensor, due: Due, ops: MatrixOps) -> Tensor:
    """Return the top r of a sketch of r + 8 columns, after two power steps."""
    r, n = due.rank, g.shape[-1]
    sketches = torch.stack([_gaussian(n, min(n, r + OVERSAMPLING), seed) for seed in due.seeds])
    y = _powers(g, sketches.to(device=g.device, dtype=g.dtype), POWER_STEPS, due, ops)
    y = _orthonormal(y, ops, due)

    def leading(small: Tensor, places: list[int]) -> Tensor:
        """Return the top r left singular vectors of Y^T G, (j', columns, r)."""
        wide = small.double()
        values, vectors = _top(wide @ wide.mT, r, cutoff_of(ops.shape, g.dtype))
        return vectors * (values > 0)[:, None]

    return y @ ops.at_owner(y.to(g.dtype).mT @ g, leading, due.places)


def _of_r_columns(g: Tensor, due: Due, ops: MatrixOps) -> Tensor:
    """Return the span of a sketch of r columns, after more power steps: no eigenvectors needed.

    They stand in for the eight columns more: |Q^T G| is between .5% below (for r = 1: 1%) that of
    ``_oversampled`` and 7% above it, for r from 1 to 192 and singular values that are equal,
    random, 1 / i^p or exponential; from r = 48 on within .8% below r = n / 4 and .2% above
    (measured).
    """
    sketches = torch.stack([_uniform(g.shape[-1], due.rank, seed, g.device) for seed in due.seeds])
    steps = MORE_POWER_STEPS + FEW // due.rank
    y = _powers(g, sketches.to(g.dtype), steps, due, ops)
    return _orthonormal(y, ops, due, cutoff_of(ops.shape, g.dtype))


def _powers(g: Tensor, sketches: Tensor, steps: int, due: Due, ops: MatrixOps) -> Tensor:
    """Return (G G^T)^steps G S of sketches S (j, n, columns), made orthonormal on the way."""
    y = g @ sketches
    for _ in range(steps):
        y = _orthonormal(y, ops, due).to(g.dtype)
        # G^T Y is made orthonormal, too: the product G (G^T Y) would lose what kappa(G)^2 hides
        y = g @ ops.at_owner(g.mT @ y, lambda z, _: _orthonormal_whole(z), due.places)
    return y


def svd(g: Tensor, due: Due, ops: MatrixOps) -> Tensor:
    """Return a basis from the eigenvectors of G^T G in float64; waits for the device.

    Arguments as of ``randomized``.
    """
    wide = g.double()

    def leading(gram: Tensor, places: list[int]) -> Tensor:
        """Return the top r right singular vectors over their singular values, (j', n, r)."""
        values, vectors = _top(gram, due.rank, cutoff_of(ops.shape, g.dtype))
        scale = torch.where(values > 0, torch.where(values > 0, values, 1.0).rsqrt(), 0.0)
        return vectors * scale[:, None]

    return _orthonormal(wide @ ops.at_owner(wide.mT @ wide, leading, due.places), ops, due)


BASES: dict[str, Callable[[Tensor, Due, MatrixOps], Tensor]] = {
    "randomized": randomized,
    "svd": svd,
}


def cutoff_of(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return the ratio to the largest singular value up to which singular values are null."""
    return max(shape) * torch.finfo(dtype).eps


def take(x: Tensor, places: Sequence[int]) -> Tensor:
    """Return x[places]; where indices would be copied from the host, which waits, without any."""
    if gram_root.may_wait(x):
        return x[places]
    if len(places) == len(x):
        return x
    return torch.stack([x[k] for k in places]) if places else x[:0]


def put(x: Tensor, places: Sequence[int], values: Tensor) -> None:
    """Write x[places] = values, as ``take`` reads."""
    if gram_root.may_wait(x):
        x[places] = values
    elif places:
        torch._foreach_copy_([x[k] for k in places], list(values.unbind()))


def hash_of(text: str) -> int:
    """Return a number below 2^63 that is the same for a text in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _orthonormal(y: Tensor, ops: MatrixOps, due: Due, cutoff: float = 0.0) -> Tensor:
    """Return orthonormal columns with the span of Y's columns, in float64: the polar factor of Y.

    Gram matrices are used, twice: the first time leaves errors of eps64 kappa(Y)^2.
    Columns that are zero stay zero.
    """
    y = y.double()
    y = y @ ops.at_owner(y.mT @ y, lambda gram, _: _root(gram, cutoff), due.places)
    again = _root if gram_root.may_wait(y) else gram_root.polish
    return y @ ops.at_owner(y.mT @ y, lambda gram, _: again(gram), due.places)


def _orthonormal_whole(z: Tensor) -> Tensor:
    """Return the result of ``_orthonormal`` for z (j', n, columns) in one place, in z's dtype."""
    wide = z.double()
    wide = wide @ _root(wide.mT @ wide)
    again = _root if gram_root.may_wait(z) else gram_root.polish
    return (wide @ again(wide.mT @ wide)).to(z.dtype)


def _root(gram: Tensor, cutoff: float = 0.0) -> Tensor:
    """Return the factor from the right that makes the columns of this Gram matrix orthonormal."""
    return gram_root.inverse_root(gram, cutoff, right=True)


def _top(gram: Tensor, r: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Return the largest r eigenvalues (j, r), 0 where null, and their vectors (j, s, r).

    The largest entry of each vector is positive. Both are NaN where the trace is not finite, as in
    ``inverse_root``.
    """
    is_finite = gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()[:, None]
    lam, v = torch.linalg.eigh(torch.where(is_finite[:, None], gram, 0.0))
    lam, v = lam.flip(-1)[:, :r], v.flip(-1)[:, :, :r]
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    v = torch.where(largest < 0, -v, v)
    relative_cutoff = max(cutoff**2, gram.shape[-1] * torch.finfo(gram.dtype).eps)
    lam = torch.where(lam > lam[:, :1] * relative_cutoff, lam, 0.0)
    return torch.where(is_finite, lam, math.nan), torch.where(is_finite[:, None], v, math.nan)


def _gaussian(rows: int, columns: int, seed: str) -> Tensor:
    """Return a float32 matrix of standard normal numbers, which depend on the seed's text alone."""
    generator = torch.Generator().manual_seed(hash_of(seed))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)


def _uniform(rows: int, columns: int, seed: str, device: torch.device) -> Tensor:
    """Return a float32 matrix of uniform numbers in [-1, 1), the same for a seed on every device.

    Made where it is used: integers that count are hashed (splitmix64), and integers have no
    roundings. torch's own numbers depend on the kind of GPU.
    """
    x = torch.arange(rows * columns, device=device, dtype=torch.int64)
    x = x.mul_(_signed(0x9E3779B97F4A7C15)).add_(hash_of(seed))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_((x >> shift) & ((1 << 64 - shift) - 1)).mul_(_signed(factor))
    return ((x >> 40).float() * 2.0**-23).view(rows, columns)


def _signed(number: int) -> int:
    """Return the int64 of the same 64 bits."""
    return number - (number >> 63 << 64)
