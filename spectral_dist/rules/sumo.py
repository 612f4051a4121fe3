"""SUMO (arXiv 2505.24749): exact polar factors of the momentum in a subspace of the gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_dist.polar import gram_root
from spectral_dist.rules.base import MatrixOps, PolarSpec, Rule, Shape, StateSpec
from spectral_dist.rules.fields import choice, is_whole, number, option, whole
from spectral_dist.rules.options import ScaledOptions
from spectral_dist.rules.registry import register
from spectral_dist.rules.scales import SCALES
from spectral_dist.rules.sumo_bases import BASES, Due, cutoff_of, hash_of, put, take
from spectral_dist.rules.sumo_starts import count_first_steps, hold_back_first_steps


def _rank_problem(value: object) -> str | None:
    """Return what is wrong with a rank, or None."""
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
        """Check all options, and those that the subspace does not go together with.

        Raises:
            ValueError: names the option; begins with ``where``.
        """
        super().check(where)
        if 0 < self.limiter < 1:
            self.invalid(where, "limiter", "write the growth allowed, at least 1; 0 turns it off")
        if self.strategy == "split":
            self.invalid(
                where, "strategy", "SUMO works in small subspaces already; write 'owner' or 'gram'"
            )
        if self.strategy == "block":
            self.invalid(
                where, "strategy", "SUMO's bases are those of whole matrices; write 'owner'"
            )
        if self.replicate_momentum:
            why = "SUMO has none: its state is at owners, and spectral_dist.checkpoint saves it"
            self.invalid(where, "replicate_momentum", why)


@register("sumo")
class SUMO(Rule[SUMOOptions]):
    """Orthogonalize the momentum inside a subspace of the gradient, exactly (arXiv 2505.24749).

    With m the long side (the transpose is stepped otherwise) and Q m x r, M r x n:

    every K steps  Q' = top r left singular vectors of G;  M <- (Q'^T Q) M;  Q <- Q'
                   C = Q^T G;  M <- mu M + C;  O = polar(M), exact
                   D = p (G - Q C) + s Q O;  D <- D gamma |D before| / |D| if that is below 1
                   W <- (1 - lr wd) W - lr D

    Q and M are matrix state, r (m + n) numbers. A direction is null if its singular value is at
    most eps max(m, n) times the largest: in Q it is a column of zeros, in O it is left out. On GPUs
    there are no eigendecompositions (``gram_root`` says what comes out), and Q is a partial
    isometry. At r >= min(m, n) Q is the identity and not kept: Muon with an exact factor.
    K is the period, mu the momentum, gamma the limiter, p perp_scale (1 in the paper, 0 stays in
    the subspace) and s the scale; Q is refreshed as well when |C| is at most refresh_below.
    """

    example = "lr=0.02, rank=0.25"
    quantities: ClassVar[Mapping[str, str]] = {"captured_fraction": "|Q^T G| / |G| of the subspace"}

    def has_momentum(self, options: SUMOOptions) -> bool:
        """Return False: M is matrix state."""
        return False

    def prepare(self, options: SUMOOptions, shapes: Mapping[str, Shape]) -> SUMOOptions:
        """Return the options unchanged; warn of matrices without a smaller subspace."""
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
        """Return Q, M, |D| of the step before, and the steps since the first nonzero gradient."""
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
        """Return the exact polar factor in the subspace."""
        return PolarSpec("eigh", rank=rank_of(options, shape))

    def direction(self, options: SUMOOptions, matrices: Tensor, ops: MatrixOps) -> Tensor:
        """Return D of each matrix of (k, m, n), in at least float32."""
        m, n = ops.shape
        g = matrices if m >= n else matrices.mT  # (k, slab of m, n)
        g = g.to(ops.state["moment"].dtype)
        has_basis = "basis" in ops.state
        counts_later = has_basis and not gram_root.may_wait(g)
        if counts_later:
            count_first_steps(ops)
        d = (self._subspace_direction if has_basis else self._full_direction)(options, g, ops)
        if options.limiter:
            d = _limited(d, options.limiter, ops)
        ops.state["step"].add_(1)
        if counts_later:
            hold_back_first_steps(ops)
        return d if m >= n else d.mT

    def _subspace_direction(self, options: SUMOOptions, g: Tensor, ops: MatrixOps) -> Tensor:
        """Return D of a step in the subspace, (k, slab of m, n)."""
        basis, moment = ops.state["basis"], ops.state["moment"]
        factor, perp = scale_of(options, ops.shape), options.perp_scale
        self._refresh_bases(options, g, ops)

        def advance(inside: Tensor, places: list[int]) -> Tensor:
            """Update M at the owner and return s O - p C, (k', r, n)."""
            moment.mul_(options.momentum).add_(inside)
            polar = exact_polar(moment, cutoff_of(ops.shape, moment.dtype))
            ops.count_polar(places, moment, polar)
            return torch.add(polar * factor, inside, alpha=-perp)

        projected = basis.mT @ g
        ops.note("captured_fraction", lambda: _captured(projected, g, ops))
        d = basis @ ops.at_owner(projected, advance)
        return torch.add(d, g, alpha=perp) if perp else d

    def _full_direction(self, options: SUMOOptions, g: Tensor, ops: MatrixOps) -> Tensor:
        """Return D where the subspace is all there is: s polar(M), (k, slab of m, n)."""
        moment = ops.state["moment"]
        moment.mul_(options.momentum).add_(g)
        wide, cutoff = moment.double(), cutoff_of(ops.shape, moment.dtype)

        def root(gram: Tensor, places: list[int]) -> Tensor:
            """Return the inverse square root of each Gram matrix M^T M, (k', n, n)."""
            return gram_root.inverse_root(gram, cutoff, right=True)

        polar = (wide @ ops.at_owner(wide.mT @ wide, root)).to(moment.dtype)
        ops.count_polar(None, moment, polar)
        return polar * scale_of(options, ops.shape)

    def _refresh_bases(self, options: SUMOOptions, g: Tensor, ops: MatrixOps) -> None:
        """Compute a new Q for the matrices that are due in this step, and carry M into it."""
        steps, names = ops.state["step"].tolist(), ops.names
        places = [k for k, t in enumerate(steps) if is_refresh_step(options, names[k], t)]
        basis, moment = ops.state["basis"], ops.state["moment"]
        if options.refresh_below:
            squares = ops.at_owner(basis.mT @ g, lambda c, _: _squares(c))
            is_low = squares[:, 0].sqrt() <= options.refresh_below
            places = sorted({*places, *is_low.nonzero()[:, 0].tolist()})  # waits for the device
        if not places:
            return

        def carry(rotation: Tensor, places: list[int]) -> Tensor:
            """Replace M by (Q'^T Q) M at the owner; return nothing for the other ranks."""
            put(moment, places, rotation @ take(moment, places))
            return rotation.new_empty(len(rotation), 0)

        seeds = [f"{options.seed} {names[k]} {steps[k]}" for k in places]
        due = Due(places, rank_of(options, ops.shape), seeds)
        new_basis = BASES[options.basis](take(g, places), due, ops).to(basis.dtype)
        ranks, old_basis = ops.inner(new_basis, new_basis), take(basis, places)
        # a gradient of zero has no basis: the old one stays
        new_basis = torch.where(ranks[:, None, None] > 0.5, new_basis, old_basis)
        ops.at_owner(new_basis.mT @ old_basis, carry, places)
        put(basis, places, new_basis)
        first = [i for i, k in enumerate(places) if steps[k] == 0]
        if first and gram_root.may_wait(g):
            # a gradient of zero makes no first step either
            for i, rank in zip(first, ranks[first].tolist(), strict=True):
                ops.state["step"][places[i]] -= int(rank < 0.5)


def rank_of(options: SUMOOptions, shape: tuple[int, int]) -> int:
    """Return r, the dimensions of the subspace, for a matrix of this shape."""
    rank, short = options.rank, min(shape)
    return max(1, min(short, round(rank * short) if isinstance(rank, float) else rank))


def scale_of(options: SUMOOptions, shape: tuple[int, int]) -> float:
    """Return s for a matrix of this shape.

    The factor is Muon's, but ``match_rms_adamw`` takes into account that only r of min(m, n)
    singular values are 1.
    """
    m, n = shape
    if options.scale == "match_rms_adamw":
        return 0.2 * math.sqrt(m * n / rank_of(options, shape))
    return SCALES[options.scale](m, n)


def is_refresh_step(options: SUMOOptions, name: str, step: int) -> bool:
    """Return whether a matrix gets a new basis in this step, whatever its gradient.

    A matrix gets one in the first step whose gradient is not zero, then every ``period`` steps, at
    a phase that depends on its name: few matrices at a time.

    Args:
        options: of the group.
        name: of the matrix.
        step: counted from 0.
    """
    return step == 0 or (step + hash_of(name)) % int(options.period) == 0


def exact_polar(x: Tensor, cutoff: float) -> Tensor:
    """Return U V^T of x (k, r, n), r <= n, from X X^T in float64, in the dtype of x."""
    wide = x.double()
    return (gram_root.inverse_root(wide @ wide.mT, cutoff) @ wide).to(x.dtype)


def _limited(d: Tensor, limit: float, ops: MatrixOps) -> Tensor:
    """Return D, scaled down where it is longer than ``limit`` times the D of the step before."""
    norms, last_norms = _norms(d, ops), ops.state["norm"]
    factors = torch.where(last_norms > 0, torch.clamp(limit * last_norms / norms, max=1.0), 1.0)
    last_norms.copy_(norms * factors)
    return d * factors.to(d.dtype)[:, None, None]


def _squares(x: Tensor) -> Tensor:
    """Return the squared Frobenius norms, (k, 1) float64: in float32 they may overflow."""
    rows: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return rows.double().square().sum(-1, keepdim=True)


def _norms(x: Tensor, ops: MatrixOps) -> Tensor:
    """Return the Frobenius norms of whole matrices, (k,) float64."""
    return ops.at_owner(_squares(x), lambda sums, _: sums)[:, 0].sqrt()


def _captured(projected: Tensor, g: Tensor, ops: MatrixOps) -> Tensor:
    """Return |Q^T G| / |G| of whole matrices, (k,) float64."""
    squares, norms = ops.at_owner(projected, lambda c, _: _squares(c)), _norms(g, ops)
    return squares[:, 0].sqrt() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
