"""SUMO (arXiv 2505.24749): exact polar factors of the momentum in a subspace of the gradient."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_dist.polar import of_gram
from spectral_dist.rules.muon import SCALES
from spectral_dist.rules.rule import Handle, Kept, Rule

OVERSAMPLING = 8
"""Columns of the sketch beyond the rank."""
POWER_STEPS = 2
"""Times that a sketch Y is replaced by G G^T Y."""


class SUMO(Rule):
    """With m the long side (the transpose is stepped otherwise) and Q m x r, M r x n:

    every K steps  Q' = top r left singular vectors of G;  M <- (Q'^T Q) M;  Q <- Q'
                   C = Q^T G;  M <- mu M + C;  O = polar(M), exact
                   D = p (G - Q C) + s Q O;  D <- D gamma |D before| / |D| if that is below 1
                   W <- (1 - lr wd) W - lr D

    Q and M are matrix state, r (m + n) numbers. A direction is null if its singular value is at
    most eps max(m, n) times the largest: in Q it is a column of zeros, in O it is left out. At
    r >= min(m, n) Q is the identity and not kept: Muon with an exact factor.
    Options: rank (r, or a fraction of min(m, n)), period (K), refresh_below (Q is refreshed as well
    when |C| is at most that; 0 never), momentum (mu), limiter (gamma; 0 is off), perp_scale (p; 1
    in the paper, 0 stays in the subspace), scale (s), basis (how Q' is found), seed, weight_decay
    (wd).
    """

    momentum = False

    def request(
        self, options: dict[str, Any], momenta: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """G itself."""
        return list(grads)

    def keeps(self, options: dict[str, Any], shape: tuple[int, int]) -> dict[str, Kept]:
        """Q, M, |D| of the step before, and the steps from the first gradient not zero on."""
        short, long = sorted(shape)
        r = rank_of(options, shape)
        found = {"step": Kept((), "all", torch.int64), "norm": Kept((), "all", torch.float64)}
        if r == short:
            return {**found, "moment": Kept((long, short), "slab")}
        return {**found, "basis": Kept((long, r), "slab"), "moment": Kept((r, short), "owner")}

    def direction(
        self, options: dict[str, Any], matrices: Tensor, handle: Handle
    ) -> tuple[Tensor, Tensor | None]:
        """D of each of (k, m, n)."""
        m, n = handle.shape
        g = matrices if m >= n else matrices.mT  # (k, slab of m, n)
        g = g.to(handle.state["moment"].dtype)
        d = (self._inside if "basis" in handle.state else self._whole)(options, g, handle)
        if options["limiter"]:
            d = _limited(d, options["limiter"], handle)
        handle.state["step"].add_(1)
        return d if m >= n else d.mT, None

    def _inside(self, options: dict[str, Any], g: Tensor, handle: Handle) -> Tensor:
        """D from a step in the subspace."""
        basis, moment = handle.state["basis"], handle.state["moment"]
        factor, perp = scale_of(options, handle.shape), options["perp_scale"]
        self._refresh(options, g, handle)

        def advance(inside: Tensor, places: list[int]) -> Tensor:
            """s O - p C at the owner, (k', r, n)."""
            moment.mul_(options["momentum"]).add_(inside)
            polar = exact_polar(moment, cutoff_of(handle.shape, moment.dtype))
            handle.orthogonalized(places, moment, polar)
            return torch.add(polar * factor, inside, alpha=-perp)

        projected = basis.mT @ g
        handle.note("captured_fraction", lambda: _captured(projected, g, handle))
        d = basis @ handle.at_owner(projected, advance)
        return torch.add(d, g, alpha=perp) if perp else d

    def _whole(self, options: dict[str, Any], g: Tensor, handle: Handle) -> Tensor:
        """D where the subspace is all there is: s polar(M)."""
        moment = handle.state["moment"]
        moment.mul_(options["momentum"]).add_(g)
        wide, cutoff = moment.double(), cutoff_of(handle.shape, moment.dtype)

        def root(gram: Tensor, places: list[int]) -> Tensor:
            return of_gram.inverse_root(gram, cutoff)

        polar = (wide @ handle.at_owner(wide.mT @ wide, root)).to(moment.dtype)
        handle.orthogonalized(None, moment, polar)
        return polar * scale_of(options, handle.shape)

    def _refresh(self, options: dict[str, Any], g: Tensor, handle: Handle) -> None:
        """A new Q for those whose turn it is, and M carried into it."""
        steps = handle.state["step"].tolist()
        due = [k for k, t in enumerate(steps) if refreshes(options, handle.names[k], t)]
        basis, moment = handle.state["basis"], handle.state["moment"]
        if options["refresh_below"]:
            inside = handle.at_owner(basis.mT @ g, lambda c, _: _squares(c))
            low = inside[:, 0].sqrt() <= options["refresh_below"]
            due = sorted({*due, *low.nonzero()[:, 0].tolist()})  # waits for the device
        if not due:
            return

        def carry(turn: Tensor, places: list[int]) -> Tensor:
            moment[places] = turn @ moment[places]
            return turn.new_empty(len(turn), 0)

        found = BASES[options["basis"]](options, g[due], handle, due).to(basis.dtype)
        ranks = handle.inner(found, found)
        # of a gradient that is zero there is no basis: the old one stays
        found = torch.where(ranks[:, None, None] > 0.5, found, basis[due])
        handle.at_owner(found.mT @ basis[due], carry, due)
        basis[due] = found
        first = [i for i, k in enumerate(due) if steps[k] == 0]
        if first:  # nor is it a first step: waits for the device, until there has been one
            for i, rank in zip(first, ranks[first].tolist(), strict=True):
                handle.state["step"][due[i]] -= int(rank < 0.5)


def rank_of(options: dict[str, Any], shape: tuple[int, int]) -> int:
    """r of a matrix of this shape."""
    rank, short = options["rank"], min(shape)
    return max(1, min(short, round(rank * short) if isinstance(rank, float) else rank))


def scale_of(options: dict[str, Any], shape: tuple[int, int]) -> float:
    """s: as Muon's, but ``match_rms_adamw`` knows that r of min(m, n) singular values are 1."""
    m, n = shape
    if options["scale"] == "match_rms_adamw":
        return 0.2 * math.sqrt(m * n / rank_of(options, shape))
    return SCALES[options["scale"]](m, n)


def cutoff_of(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Singular values up to this times the largest are null."""
    return max(shape) * torch.finfo(dtype).eps


def refreshes(options: dict[str, Any], name: str, step: int) -> bool:
    """Whether the matrix gets a new basis in this step, counted from 0, whatever its gradient.

    In the first one with a gradient that is not zero, then every ``period`` steps, at a phase of
    its own: few at a time.
    """
    return step == 0 or (step + _hash(name)) % int(options["period"]) == 0


def exact_polar(x: Tensor, cutoff: float) -> Tensor:
    """U V^T of (k, r, n), r <= n, from eigh of X X^T in float64; as X's dtype."""
    wide = x.double()
    return (of_gram.inverse_root(wide @ wide.mT, cutoff) @ wide).to(x.dtype)


def _limited(d: Tensor, limit: float, handle: Handle) -> Tensor:
    """D, no longer than ``limit`` times the one before."""
    norms, before = _norms(d, handle), handle.state["norm"]
    allowed = torch.where(before > 0, torch.clamp(limit * before / norms, max=1.0), 1.0)
    before.copy_(norms * allowed)
    return d * allowed.to(d.dtype)[:, None, None]


def _squares(x: Tensor) -> Tensor:
    """Of Frobenius norms, (k, 1) float64: those of float32 may overflow."""
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return rows.double().square().sum(-1, keepdim=True)


def _norms(x: Tensor, handle: Handle) -> Tensor:
    """Frobenius norms of whole matrices, (k,) float64."""
    return handle.at_owner(_squares(x), lambda sums, _: sums)[:, 0].sqrt()


def _captured(projected: Tensor, g: Tensor, handle: Handle) -> Tensor:
    """|Q^T G| / |G|."""
    inside, whole = handle.at_owner(projected, lambda c, _: _squares(c)), _norms(g, handle)
    return inside[:, 0].sqrt() / whole.clamp_min(torch.finfo(whole.dtype).tiny)


# -- bases: the top r left singular vectors of (j, slab of m, n), of the matrices ``due``


def randomized(options: dict[str, Any], g: Tensor, handle: Handle, due: Sequence[int]) -> Tensor:
    """From a sketch of r + 8 columns and two power steps (Halko, Martinsson, Tropp 2011, 4.4).

    A sketch is the same on every rank and device: its seed is a hash of (seed, name, step).
    """
    r, n = rank_of(options, handle.shape), g.shape[-1]
    columns, steps = min(n, r + OVERSAMPLING), handle.state["step"].tolist()
    seeds = [f"{options['seed']} {handle.names[k]} {steps[k]}" for k in due]
    sketches = torch.stack([_gaussian(n, columns, seed) for seed in seeds])
    y = g @ sketches.to(device=g.device, dtype=g.dtype)
    for _ in range(POWER_STEPS):
        y = _orthonormal(y, handle, due).to(g.dtype)
        # orthonormal in the half step, too: products of both would lose what kappa(G)^2 hides
        y = g @ handle.at_owner(g.mT @ y, lambda z, _: _orthonormal_whole(z), due)
    y = _orthonormal(y, handle, due)

    def leading(small: Tensor, places: list[int]) -> Tensor:
        """The top r left singular vectors of Y^T G, (j', columns, r)."""
        wide = small.double()
        values, vectors = _top(wide @ wide.mT, r, cutoff_of(handle.shape, g.dtype))
        return vectors * (values > 0)[:, None]

    return y @ handle.at_owner(y.to(g.dtype).mT @ g, leading, due)


def svd(options: dict[str, Any], g: Tensor, handle: Handle, due: Sequence[int]) -> Tensor:
    """From the eigenvectors of G^T G in float64."""
    r, wide = rank_of(options, handle.shape), g.double()

    def leading(gram: Tensor, places: list[int]) -> Tensor:
        """The top r right singular vectors over their singular values, (j', n, r)."""
        values, vectors = _top(gram, r, cutoff_of(handle.shape, g.dtype))
        scale = torch.where(values > 0, torch.where(values > 0, values, 1.0).rsqrt(), 0.0)
        return vectors * scale[:, None]

    return _orthonormal(wide @ handle.at_owner(wide.mT @ wide, leading, due), handle, due)


BASES: dict[str, Callable[[dict[str, Any], Tensor, Handle, Sequence[int]], Tensor]] = {
    "randomized": randomized,
    "svd": svd,
}


def _orthonormal(y: Tensor, handle: Handle, due: Sequence[int]) -> Tensor:
    """Orthonormal columns with the span of Y's, in float64: its polar factor, by Grams.

    Twice: the first leaves errors of eps64 kappa(Y)^2. Columns that are zero stay so.
    """
    y = y.double()
    for _ in range(2):
        y = y @ handle.at_owner(y.mT @ y, lambda gram, _: of_gram.inverse_root(gram), due)
    return y


def _orthonormal_whole(z: Tensor) -> Tensor:
    """The same of Z that is in one place, as Z's dtype."""
    wide = z.double()
    for _ in range(2):
        wide = wide @ of_gram.inverse_root(wide.mT @ wide)
    return wide.to(z.dtype)


def _top(gram: Tensor, r: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """The largest r eigenvalues (j, r), 0 where null, and their vectors (j, s, r).

    NaN where the trace is not finite, as ``inverse_root``. Signs: the largest entry is positive.
    """
    fine = gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()[:, None]
    lam, v = torch.linalg.eigh(torch.where(fine[:, None], gram, 0.0))
    lam, v = lam.flip(-1)[:, :r], v.flip(-1)[:, :, :r]
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    v = torch.where(largest < 0, -v, v)
    least = max(cutoff**2, gram.shape[-1] * torch.finfo(gram.dtype).eps)
    lam = torch.where(lam > lam[:, :1] * least, lam, 0.0)
    return torch.where(fine, lam, math.nan), torch.where(fine[:, None], v, math.nan)


def _gaussian(rows: int, columns: int, seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(_hash(seed))
    return torch.randn(rows, columns, generator=generator)


def _hash(text: str) -> int:
    """The same in every process, below 2^63."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
