"""Polar factors by any method, and the checks of a method's name, number of steps and dtype."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.polar import exact, gram_root, graphs, newton_schulz, products
from spectral_dist.polar.batching import CPU_BATCH, batch_has_same_bits
from spectral_dist.polar.products import ALIGNED, HALF, products_for
from spectral_dist.polar.qdwh import polar_by_qdwh
from spectral_dist.polar.scaling import null_cutoff, unit_frobenius
from spectral_dist.polar.schedules import SCHEDULES, Row, check_steps
from spectral_dist.polar.schedules import rows as named_rows
from spectral_dist.polar.stability import check_rows
from spectral_dist.polar.zolo import polar_by_zolo

__all__ = [
    "DTYPES",
    "METHODS",
    "Method",
    "check",
    "null_cutoff",
    "polar",
    "resolve_dtype",
    "rows_of",
]

_GRAM = "gram_"
_CONVERGED = {
    "qdwh": (torch.float32, torch.float64),
    "zolo": (torch.float64,),
    "svd": (torch.float32, torch.float64),
    "eigh": (torch.float64,),
}
"""Methods that end at the polar factor itself, and the dtypes in which they compute."""

METHODS: tuple[str, ...] = (*SCHEDULES, *(_GRAM + name for name in SCHEDULES), *_CONVERGED)
"""Every name that ``method`` may have."""

Method = str | Sequence[Sequence[float]]
"""A name out of ``METHODS``, or a schedule of one's own: the (a, b, c) of every step."""

_HALF_MARGIN = 1e-3
"""Relative growth per step with which every named schedule but ``cans`` stays stable."""

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@explained
@torch.no_grad()
def polar(
    x: Tensor,
    *,
    method: Method = "jordan",
    steps: int | None = None,
    compute_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """Return U V^T of every matrix of x = U S V^T, or an approximation of it.

    The result does not depend on the scale of x, and zero gives zero. On CPUs the result is bitwise
    that of each matrix alone. Nothing is raised for what the values are: a matrix that has NaN or
    infinity, and one whose SVD or eigh does not converge, comes out as NaN; others are unaffected.

    Without full rank (behind a LayerNorm gradients lack one) rounding leaves singular values that
    mean nothing. svd and eigh take for zero what is at most the cutoff times the largest: max(m, n)
    eps of x's own dtype, in half precision its eps (see ``null_cutoff``), whatever dtype the method
    computes in; eigh of float64 input also drops what is at most the root of min(m, n) eps. The
    result is a partial isometry then. qdwh and zolo take what is at most a tenth of the cutoff to 0
    and what is at least 2.3 times the cutoff to 1; what is in between comes out in [0, 1]. On a GPU
    and in float32, qdwh is a schedule of products in float64 (``gram_root.polar_by_products``): it
    takes what is at most 4.8e-7 to 0, and what is at least the cutoff (or 1e-5) to 1. Measured
    on float32 gradients of 57 x 40 and rank 18: all four give 18 ones and 22 zeros (below 2e-7). A
    schedule maps null directions as others: up to a_1 ... a_n times as long (485 for ``jordan``).

    Muon: Keller Jordan 2024, kellerjordan.github.io/posts/muon; CANS: arXiv 2506.10935; Polar
    Express: arXiv 2505.16932; Gram form: tridao.me/blog/2026/gram-newton-schulz; qdwh and
    zolo: see ``polar_by_qdwh`` and ``polar_by_zolo``.

    Args:
        x: (..., m, n), any floating dtype and device; it is not changed.
        method: a Newton-Schulz schedule (``jordan``, ``quintic``, ``cans``, ``cubic5``,
            ``deepseekv4``, ``polar_express``); the same polynomial iterated on the Gram matrix of
            the short side (``gram_*``: fewer FLOPs, so only for matrices at least 1.5 times as long
            as wide); ``qdwh`` or ``zolo`` (rational iterations that converge); ``svd`` or ``eigh``;
            or rows [[a, b, c], ...] of X <- a X + (b A + c A^2) X, A = X X^T, from ||X||_F = 1,
            which must be stable.
        steps: of a schedule; None is its default. The last of rows [[a, b, c], ...] repeats.
        compute_dtype: see ``resolve_dtype``.

    Returns:
        A new contiguous tensor with the shape, dtype and device of x; not differentiable.

    Raises:
        ValueError: an option is wrong or would have no effect, x is no batch of matrices, or
            ``set_products("triton")`` has no kernels for its device.
    """
    check(method, steps, compute_dtype)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; polar takes matrices, (..., m, n)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; polar takes floating-point matrices")
    dtype = resolve_dtype(method, compute_dtype, x.dtype, x.device)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch = x.reshape(-1, *x.shape[-2:])
    threads = torch.get_num_threads()

    def is_batch(count: int) -> bool:
        """Return whether so many matrices are computed in one call."""
        if x.device.type != "cpu":
            return True
        shape = (count, *x.shape[-2:])
        is_few = count <= CPU_BATCH
        return is_few and _rounds_alike(shape, x.dtype, _hashable(method), steps, dtype, threads)

    if is_batch(len(batch)):
        return _factor(batch, method, steps, dtype).reshape(x.shape)
    out = torch.empty(batch.shape, dtype=x.dtype)
    for start in range(0, len(batch), CPU_BATCH):
        stop = min(start + CPU_BATCH, len(batch))
        size = stop - start if is_batch(stop - start) else 1
        for i in range(start, stop, size):  # each in fresh memory: see ``batching``
            out[i : i + size] = _factor(batch[i : i + size], method, steps, dtype)
    return out.reshape(x.shape)


@lru_cache(maxsize=1024)
def _rounds_alike(
    shape: tuple[int, int, int],
    given: torch.dtype,
    method: Method,
    steps: int | None,
    dtype: torch.dtype,
    threads: int,
) -> bool:
    """Return whether a batch on the CPU gives the bits of each matrix alone, with these threads."""
    return batch_has_same_bits(lambda x, _: [_factor(x, method, steps, dtype)], shape, given)


def _factor(x: Tensor, method: Method, steps: int | None, dtype: torch.dtype) -> Tensor:
    """Return the polar factors of x (k, m, n) by ``method``, computed in ``dtype``."""
    polynomials = rows_of(method, steps)
    if polynomials is None:
        if method == "svd":
            factors = exact.polar_by_svd(x, dtype)
        elif method == "eigh":
            factors = exact.polar_by_eigh(x)
        elif method == "zolo":
            factors = polar_by_zolo(x)
        elif dtype == torch.float64 or gram_root.may_wait(x):
            factors = polar_by_qdwh(x, dtype)
        else:
            # QR of a batch is one matrix after the other on a GPU: on an H100 a step of PolarGrad
            # took 24 times as long with it as with ``jordan``
            factors = gram_root.polar_by_products(x)
        return factors.to(x.dtype)
    rows, safety = polynomials
    short, long = sorted(x.shape[-2:])
    # near-square matrices cost more in the Gram form: measured 1.2 times the standard form's time
    # at 384 x 384, .8 times at 384 x 1024
    uses_gram = str(method).startswith(_GRAM) and long >= 1.5 * short
    iterate = newton_schulz.gram if uses_gram else newton_schulz.standard

    symmetric = products_for(short, dtype, x.device)

    def compute(x: Tensor) -> Tensor:
        y = iterate(unit_frobenius(x, dtype, safety, _multiple(x, dtype)), rows, symmetric)
        # what was filled up with zeros: they stay zeros, and change nothing in the others
        return y[:, : x.shape[1], : x.shape[2]].to(x.dtype).contiguous()

    if graphs.wanted(x):
        return graphs.replayed(compute, x, (iterate, rows, safety, dtype, symmetric))
    return compute(x)


def _multiple(x: Tensor, dtype: torch.dtype) -> int:
    """Return the multiple that the sides of an iteration on x in ``dtype`` should be of.

    On GPUs, of half precision: rows that do not begin at 16 bytes take cuBLAS 5 times as long
    (measured on an H100, 2048 x 11059 in bf16). Elsewhere 1, which leaves the bits what they are.
    """
    return ALIGNED if x.is_cuda and dtype in HALF else 1


def check(
    method: Method, steps: int | None = None, compute_dtype: torch.dtype | str | None = None
) -> None:
    """Check a method with its steps and dtype, as ``polar`` does, without a matrix.

    Args:
        method: as ``polar`` takes it.
        steps: as ``polar`` takes it.
        compute_dtype: as ``polar`` takes it.

    Raises:
        ValueError: ``polar`` would refuse these options, whatever the matrix; or what the
            environment says of products and graphs.
    """
    products.choice()
    graphs.enabled()
    try:
        _check(_hashable(method), steps, compute_dtype)
    except TypeError:  # what cannot be hashed is wrong, so it need not be cached
        _check.__wrapped__(method, steps, compute_dtype)


def rows_of(method: Method, steps: int | None = None) -> tuple[tuple[Row, ...], float] | None:
    """Return the schedule of a Newton-Schulz method, or None for any other method.

    Returns:
        The (a, b, c) of every step, and the safety: the iteration starts from X / (||X||_F safety).

    Raises:
        ValueError: the schedule cannot have this number of steps, or is not stable.
    """
    try:
        return _rows_of(_hashable(method), steps)
    except TypeError:
        return _rows_of.__wrapped__(method, steps)


def _hashable(method: Method) -> Method:
    """Return the same method in a form that can be hashed: a name unchanged, rows as tuples."""
    if isinstance(method, str) or not isinstance(method, Sequence):
        return method
    return tuple([tuple(row) for row in cast(Sequence[Sequence[float]], method)])


# cached, because every step of an optimizer asks, for each of its batches; typed, because True is
# no number of steps
@lru_cache(maxsize=256, typed=True)
def _check(method: Method, steps: int | None, compute_dtype: torch.dtype | str | None) -> None:
    """Raise the ValueError of ``check``."""
    if isinstance(method, Sequence) and not isinstance(method, str):
        rows = _rows_of_table(method, steps)
        dtype = _dtype(compute_dtype)
        if dtype in HALF and not _is_stable_in_half(rows):
            raise ValueError(
                f"this schedule does not work in {_name(dtype)}: it diverges on what that rounds"
                " by; write float32 or float64, or coefficients that stay lower"
            )
        return
    if method not in METHODS:
        raise ValueError(
            f"unknown polar method {method!r}{_suggestion(method, METHODS)} Or a schedule of your"
            " own, [[a, b, c], ...]."
        )
    dtype = _dtype(compute_dtype)
    if method in _CONVERGED:
        _check_converged(method, steps, dtype)
        return
    name = method.removeprefix(_GRAM)
    named_rows(name, steps)
    if not SCHEDULES[name].stable_in_half and dtype in HALF:
        raise ValueError(
            f"polar method {method!r} does not work in {_name(dtype)}: its polynomials diverge on "
            "what that rounds by; write float32 or float64, or take 'polar_express'"
        )
    if method.startswith(_GRAM) and dtype == torch.bfloat16:
        raise ValueError(
            f"polar method {method!r} does not work in bfloat16: rounding gives the Gram matrix "
            "negative eigenvalues, which then grow; write float32 or float16, or take "
            f"{name!r} in bfloat16"
        )


def _check_converged(method: str, steps: int | None, dtype: torch.dtype | None) -> None:
    """Raise a ValueError if a method that converges gets steps, or a dtype that it lacks."""
    if steps is not None:
        why = "is exact" if method in ("svd", "eigh") else "takes the steps that it converges in"
        raise ValueError(f"steps={steps!r} would have no effect: polar method {method!r} {why}")
    if dtype is not None and dtype not in _CONVERGED[method]:
        possible = " or ".join(map(_name, _CONVERGED[method]))
        raise ValueError(
            f"polar method {method!r} computes in {possible}, not in {_name(dtype)}; write"
            f" {_name(_CONVERGED[method][0])!r}, or 'auto'"
        )


@lru_cache(maxsize=256, typed=True)
def _rows_of(method: Method, steps: int | None) -> tuple[tuple[Row, ...], float] | None:
    """Return what ``rows_of`` returns."""
    if not isinstance(method, str):
        return _rows_of_table(method, steps), 1.0
    if method in _CONVERGED:
        return None
    name = method.removeprefix(_GRAM)
    return named_rows(name, steps), SCHEDULES[name].safety


def _rows_of_table(table: Sequence[Sequence[float]], steps: int | None) -> tuple[Row, ...]:
    """Return the (a, b, c) of each step of a schedule that a user wrote.

    Raises:
        ValueError: ``check_rows`` refuses the rows, or ``steps`` is no number of steps.
    """
    check_rows(cast(Sequence[Row], table))
    rows = tuple((float(a), float(b), float(c)) for a, b, c in table)
    if steps is None:
        return rows
    check_steps(steps)
    return (*rows[:steps], *rows[-1:] * (steps - len(rows)))


@lru_cache(maxsize=256)
def _is_stable_in_half(rows: tuple[Row, ...]) -> bool:
    """Return whether a stable schedule stays stable under the rounding of half precision."""
    try:
        check_rows(rows, margin=_HALF_MARGIN)
    except ValueError:
        return False
    return True


def resolve_dtype(
    method: Method,
    compute_dtype: torch.dtype | str | None,
    x_dtype: torch.dtype,
    device: torch.device,
) -> torch.dtype:
    """Return the dtype in which ``polar`` multiplies; it normalises in float32 or float64 before.

    ``check`` says which method refuses which dtype: eigh and zolo are float64 only, svd and qdwh
    float32 or float64, ``gram_*`` never bfloat16, ``cans`` and ``gram_cans`` neither bfloat16 nor
    float16.

    Args:
        method: as ``polar`` takes it.
        compute_dtype: float16, bfloat16, float32 or float64, as a name or a torch.dtype. None and
            "auto": float64 for svd, eigh and zolo and wherever x is float64; else float32 on CPUs
            and for qdwh, ``gram_*``, ``cans`` and user-written rows that are unstable in half
            precision; bfloat16 in all other cases.
        x_dtype: the dtype of the matrices.
        device: where the matrices are.

    Raises:
        ValueError: ``compute_dtype`` is none of these.
    """
    dtype = _dtype(compute_dtype)
    if dtype is not None:
        return dtype
    if method in ("svd", "eigh", "zolo") or x_dtype == torch.float64:
        return torch.float64
    if device.type == "cpu" or method == "qdwh":
        return torch.float32
    if not isinstance(method, str):
        schedule = rows_of(method)
        return torch.bfloat16 if schedule and _is_stable_in_half(schedule[0]) else torch.float32
    if method.startswith(_GRAM) or not SCHEDULES[method].stable_in_half:
        return torch.float32
    return torch.bfloat16


def _dtype(compute_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that a user asked for, or None for "auto".

    Raises:
        ValueError: it is no dtype that ``polar`` computes in.
    """
    if compute_dtype is None or compute_dtype == "auto":
        return None
    if isinstance(compute_dtype, str) and compute_dtype in DTYPES:
        return DTYPES[compute_dtype]
    if isinstance(compute_dtype, torch.dtype) and compute_dtype in DTYPES.values():
        return compute_dtype
    hint = _suggestion(compute_dtype, ("auto", *DTYPES))
    raise ValueError(f"unknown compute_dtype {compute_dtype!r}{hint}")


def _name(dtype: torch.dtype | None) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _suggestion(word: object, words: Iterable[str]) -> str:
    """Return the end of an error text: the word that may have been meant, and the list of all."""
    nearest = difflib.get_close_matches(str(word).lower(), tuple(words), n=1)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"{suggestion} Known: {', '.join(words)}."
