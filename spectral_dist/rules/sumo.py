"""SUMO (arXiv 2505.24749): exact polar factors of the momentum in a subspace of the gradient."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_dist.polar import of_gram
from spectral_dist.rules.base import MatrixOps, PolarSpec, Rule, Shape, StateSpec
from spectral_dist.rules.fields import choice, is_whole, number, option, whole
from spectral_dist.rules.options import ScaledOptions
from spectral_dist.rules.registry import register
from spectral_dist.rules.scales import SCALES

OVERSAMPLING = 8
"""Columns of the sketch beyond the rank."""
POWER_STEPS = 2
"""Times that a sketch Y is replaced by G G^T Y."""


def _rank_problem(value: object) -> str | None:
    if (isinstance(value, float) and 0 < value <= 1) or is_whole(value, 1):
        return None
    return "write a whole number, at least 1, or a fraction of the short side in (0, 1]"


@dataclass(frozen=True)
class SUMOOptions(ScaledOptions):
    """SUMO's options."""

    rank: int | float = option(
        0.25, "Dimensions of the subspace; as a float, a fraction of the short side.",
        _rank_problem, shapes_state=True,
    )  # fmt: skip
    period: int = whole(250, "Steps from one new basis to the next.")
    refresh_below: float = number(
        0.0, "A new basis also where the projected gradient's norm is at most this; 0 never."
    )
    limiter: float = number(1.1, "Growth allowed from step to step; 0 is no limit.")
    perp_scale: float = number(1.0, "Factor of the gradient's part outside of the subspace.")
    basis: str = choice("randomized", lambda: BASES, "How a new basis is found.", "basis")
    seed: int = whole(0, "Seed of sketches.", least=0)

    def check(self, where: str) -> None:
        """Add what has no effect on the subspace."""
        super().check(where)
        if 0 < self.limiter < 1:
            self.fail(where, "limiter", "write the growth allowed, at least 1; 0 turns it off")
        if self.strategy == "block":
            self.fail(where, "strategy", "SUMO's bases are those of whole matrices; write 'owner'")
        if self.replicate_momentum:
            why = "SUMO has none: its state is at owners, and spectral_dist.checkpoint saves it"
            self.fail(where, "replicate_momentum", why)


@register("sumo")
class SUMO(Rule[SUMOOptions]):
    """Orthogonalize the momentum inside a subspace of the gradient, exactly (arXiv 2505.24749).

    With m the long side (the transpose is stepped otherwise) and Q m x r, M r x n:

    every K steps  Q' = top r left singular vectors of G;  M <- (Q'^T Q) M;  Q <- Q'
                   C = Q^T G;  M <- mu M + C;  O = polar(M), exact
                   D = p (G - Q C) + s Q O;  D <- D gamma |D before| / |D| if that is below 1
                   W <- (1 - lr wd) W - lr D

    Q and M are matrix state, r (m + n) numbers. A direction is null if its singular value is at
    most eps max(m, n) times the largest: in Q it is a column of zeros, in O it is left out. At
    r >= min(m, n) Q is the identity and not kept: Muon with an exact factor.
    K is the period, mu the momentum, gamma the limiter, p perp_scale (1 in the paper, 0 stays in
    the subspace) and s the scale; Q is refreshed as well when |C| is at most refresh_below.
    """

    example = "lr=0.02, rank=0.25"
    quantities: ClassVar[Mapping[str, str]] = {"captured_fraction": "|Q^T G| / |G| of the subspace"}

    def has_momentum(self, options: SUMOOptions) -> bool:
        """Return False: M is matrix state."""
        return False

    def prepare(self, options: SUMOOptions, shapes: Mapping[str, Shape]) -> SUMOOptions:
        """Warn of matrices that have no smaller subspace at this rank."""
        full = [name for name, shape in shapes.items() if rank_of(options, shape) == min(shape)]
        if full:
            names = ", ".join(full[:3]) + ", ..." * (len(full) > 3)
            warnings.warn(
                f"SUMO with rank {options.rank} has no smaller subspace in {len(full)} of"
                f" {len(shapes)} matrices ({names}): there it is Muon with an exact polar"
                " factor, and keeps a momentum as large as the matrix",
                stacklevel=5,
            )
        return options

    def state(self, options: SUMOOptions, shape: Shape) -> dict[str, StateSpec]:
        """Return Q, M, |D| of the step before, and the steps from the first nonzero gradient on."""
        short, long = sorted(shape)
        side: Any = "rows" if shape[0] >= shape[1] else "columns"
        r = rank_of(options, shape)
        specs = {
            "step": StateSpec((), "all", torch.int64),
            "norm": StateSpec((), "all", torch.float64),
        }
        if r == short:
            return {**specs, "moment": StateSpec((long, short), side)}
        return {
            **specs,
            "basis": StateSpec((long, r), side),
            "moment": StateSpec((r, short), "owner"),
        }

    def polar(self, options: SUMOOptions, shape: Shape) -> PolarSpec:
        """Return the exact factor of a matrix in the subspace."""
        return PolarSpec("eigh", rank=rank_of(options, shape))

    def direction(self, options: SUMOOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return D."""
        m, n = ops.shape
        g = matrices if m >= n else matrices.mT  # (k, slab of m, n)
        g = g.to(ops.state["moment"].dtype)
        d = (self._inside if "basis" in ops.state else self._whole)(options, g, ops)
        if options.limiter:
            d = _limited(d, options.limiter, ops)
        ops.state["step"].add_(1)
        return d if m >= n else d.mT

    def _inside(self, options: SUMOOptions, g: Tensor, ops: MatrixOps) -> Tensor:
        """D from a step in the subspace."""
        basis, moment = ops.state["basis"], ops.state["moment"]
        factor, perp = scale_of(options, ops.shape), options.perp_scale
        self._refresh(options, g, ops)

        def advance(inside: Tensor, places: list[int]) -> Tensor:
            """s O - p C at the owner, (k', r, n)."""
            moment.mul_(options.momentum).add_(inside)
            polar = exact_polar(moment, cutoff_of(ops.shape, moment.dtype))
            ops.count_polar(places, moment, polar)
            return torch.add(polar * factor, inside, alpha=-perp)

        projected = basis.mT @ g
        ops.note("captured_fraction", lambda: _captured(projected, g, ops))
        d = basis @ ops.at_owner(projected, advance)
        return torch.add(d, g, alpha=perp) if perp else d

    def _whole(self, options: SUMOOptions, g: Tensor, ops: MatrixOps) -> Tensor:
        """D where the subspace is all there is: s polar(M)."""
        moment = ops.state["moment"]
        moment.mul_(options.momentum).add_(g)
        wide, cutoff = moment.double(), cutoff_of(ops.shape, moment.dtype)

        def root(gram: Tensor, places: list[int]) -> Tensor:
            return of_gram.inverse_root(gram, cutoff)

        polar = (wide @ ops.at_owner(wide.mT @ wide, root)).to(moment.dtype)
        ops.count_polar(None, moment, polar)
        return polar * scale_of(options, ops.shape)

    def _refresh(self, options: SUMOOptions, g: Tensor, ops: MatrixOps) -> None:
        """A new Q for those whose turn it is, and M carried into it."""
        steps = ops.state["step"].tolist()
        due = [k for k, t in enumerate(steps) if refreshes(options, ops.names[k], t)]
        basis, moment = ops.state["basis"], ops.state["moment"]
        if options.refresh_below:
            inside = ops.at_owner(basis.mT @ g, lambda c, _: _squares(c))
            low = inside[:, 0].sqrt() <= options.refresh_below
            due = sorted({*due, *low.nonzero()[:, 0].tolist()})  # waits for the device
        if not due:
            return

        def carry(turn: Tensor, places: list[int]) -> Tensor:
            moment[places] = turn @ moment[places]
            return turn.new_empty(len(turn), 0)

        found = BASES[options.basis](options, g[due], ops, due).to(basis.dtype)
        ranks = ops.inner(found, found)
        # of a gradient that is zero there is no basis: the old one stays
        found = torch.where(ranks[:, None, None] > 0.5, found, basis[due])
        ops.at_owner(found.mT @ basis[due], carry, due)
        basis[due] = found
        first = [i for i, k in enumerate(due) if steps[k] == 0]
        if first:  # nor is it a first step: waits for the device, until there has been one
            for i, rank in zip(first, ranks[first].tolist(), strict=True):
                ops.state["step"][due[i]] -= int(rank < 0.5)


def rank_of(options: SUMOOptions, shape: tuple[int, int]) -> int:
    """r of a matrix of this shape."""
    rank, short = options.rank, min(shape)
    return max(1, min(short, round(rank * short) if isinstance(rank, float) else rank))


def scale_of(options: SUMOOptions, shape: tuple[int, int]) -> float:
    """s: as Muon's, but ``match_rms_adamw`` knows that r of min(m, n) singular values are 1."""
    m, n = shape
    if options.scale == "match_rms_adamw":
        return 0.2 * math.sqrt(m * n / rank_of(options, shape))
    return SCALES[options.scale](m, n)


def cutoff_of(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Singular values up to this times the largest are null."""
    return max(shape) * torch.finfo(dtype).eps


def refreshes(options: SUMOOptions, name: str, step: int) -> bool:
    """Whether the matrix gets a new basis in this step, counted from 0, whatever its gradient.

    In the first one with a gradient that is not zero, then every ``period`` steps, at a phase of
    its own: few at a time.
    """
    return step == 0 or (step + _hash(name)) % int(options.period) == 0


def exact_polar(x: Tensor, cutoff: float) -> Tensor:
    """U V^T of (k, r, n), r <= n, from eigh of X X^T in float64; as X's dtype."""
    wide = x.double()
    return (of_gram.inverse_root(wide @ wide.mT, cutoff) @ wide).to(x.dtype)


def _limited(d: Tensor, limit: float, ops: MatrixOps) -> Tensor:
    """D, no longer than ``limit`` times the one before."""
    norms, before = _norms(d, ops), ops.state["norm"]
    allowed = torch.where(before > 0, torch.clamp(limit * before / norms, max=1.0), 1.0)
    before.copy_(norms * allowed)
    return d * allowed.to(d.dtype)[:, None, None]


def _squares(x: Tensor) -> Tensor:
    """Of Frobenius norms, (k, 1) float64: those of float32 may overflow."""
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return rows.double().square().sum(-1, keepdim=True)


def _norms(x: Tensor, ops: MatrixOps) -> Tensor:
    """Frobenius norms of whole matrices, (k,) float64."""
    return ops.at_owner(_squares(x), lambda sums, _: sums)[:, 0].sqrt()


def _captured(projected: Tensor, g: Tensor, ops: MatrixOps) -> Tensor:
    """|Q^T G| / |G|."""
    inside, whole = ops.at_owner(projected, lambda c, _: _squares(c)), _norms(g, ops)
    return inside[:, 0].sqrt() / whole.clamp_min(torch.finfo(whole.dtype).tiny)


# -- bases: the top r left singular vectors of (j, slab of m, n), of the matrices ``due``


def randomized(options: SUMOOptions, g: Tensor, ops: MatrixOps, due: Sequence[int]) -> Tensor:
    """From a sketch of r + 8 columns and two power steps (Halko, Martinsson, Tropp 2011, 4.4).

    A sketch is the same on every rank and device: its seed is a hash of (seed, name, step).
    """
    r, n = rank_of(options, ops.shape), g.shape[-1]
    columns, steps = min(n, r + OVERSAMPLING), ops.state["step"].tolist()
    seeds = [f"{options.seed} {ops.names[k]} {steps[k]}" for k in due]
    sketches = torch.stack([_gaussian(n, columns, seed) for seed in seeds])
    y = g @ sketches.to(device=g.device, dtype=g.dtype)
    for _ in range(POWER_STEPS):
        y = _orthonormal(y, ops, due).to(g.dtype)
        # orthonormal in the half step, too: products of both would lose what kappa(G)^2 hides
        y = g @ ops.at_owner(g.mT @ y, lambda z, _: _orthonormal_whole(z), due)
    y = _orthonormal(y, ops, due)

    def leading(small: Tensor, places: list[int]) -> Tensor:
        """The top r left singular vectors of Y^T G, (j', columns, r)."""
        wide = small.double()
        values, vectors = _top(wide @ wide.mT, r, cutoff_of(ops.shape, g.dtype))
        return vectors * (values > 0)[:, None]

    return y @ ops.at_owner(y.to(g.dtype).mT @ g, leading, due)


def svd(options: SUMOOptions, g: Tensor, ops: MatrixOps, due: Sequence[int]) -> Tensor:
    """From the eigenvectors of G^T G in float64."""
    r, wide = rank_of(options, ops.shape), g.double()

    def leading(gram: Tensor, places: list[int]) -> Tensor:
        """The top r right singular vectors over their singular values, (j', n, r)."""
        values, vectors = _top(gram, r, cutoff_of(ops.shape, g.dtype))
        scale = torch.where(values > 0, torch.where(values > 0, values, 1.0).rsqrt(), 0.0)
        return vectors * scale[:, None]

    return _orthonormal(wide @ ops.at_owner(wide.mT @ wide, leading, due), ops, due)


BASES: dict[str, Callable[[SUMOOptions, Tensor, MatrixOps, Sequence[int]], Tensor]] = {
    "randomized": randomized,
    "svd": svd,
}


def _orthonormal(y: Tensor, ops: MatrixOps, due: Sequence[int]) -> Tensor:
    """Orthonormal columns with the span of Y's, in float64: its polar factor, by Grams.

    Twice: the first leaves errors of eps64 kappa(Y)^2. Columns that are zero stay so.
    """
    y = y.double()
    for _ in range(2):
        y = y @ ops.at_owner(y.mT @ y, lambda gram, _: of_gram.inverse_root(gram), due)
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
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)


def _hash(text: str) -> int:
    """The same in every process, below 2^63."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
