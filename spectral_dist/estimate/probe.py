"""What a rule does with one matrix, found by running it on tensors without memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spectral_dist.core.matrix_ops import SlabMatrixOps, StepContext, WholeMatrixOps
from spectral_dist.core.matrix_state import stacked_shape
from spectral_dist.rules.base import Rule, Shape
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.sharding.boxes import Slabs
from spectral_dist.sharding.collectives import Meter, SimulatedGroup
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.slabs import SlabBatch
from spectral_dist.sharding.split import SplitReduction

NAME = "probe"


@dataclass(frozen=True)
class Probe:
    """What one matrix takes in a step on the rank that computes it, or a slab of it.

    Attributes:
        flops: of products and decompositions, two for a multiply-add.
        polar_calls: how many polar factors are counted.
        work_bytes: the most that the rule has at once beside what it is given and keeps.
        sent_bytes: what the rule sends to other ranks; whole matrices need nothing.
        wide_flops: those of ``flops`` that are in float32 or wider.
        touched_bytes: what all other operators read and write.
        operators: how many operators are started.
        collectives: how many collective calls are made.
    """

    flops: int
    polar_calls: int
    work_bytes: int
    sent_bytes: int = 0
    wide_flops: int = 0
    touched_bytes: int = 0
    operators: int = 0
    collectives: int = 0


def probe_whole(
    rule: Rule[Any], options: MatrixOptions, shape: Shape, wire: torch.dtype, state: torch.dtype
) -> Probe:
    """Return what a whole matrix takes at its owner.

    Args:
        rule: of the matrix.
        options: of the parameter group.
        shape: (m, n) as rules read it.
        wire: the dtype in which the matrix arrives.
        state: the dtype of matrix state.
    """
    context = StepContext(rule, options, [NAME])
    specs = rule.state(options, shape)
    kept = {name: _state((1, *s.shape), s.dtype or state) for name, s in specs.items()}
    ops = WholeMatrixOps(context, [0], shape, kept)
    matrices = torch.empty(1, *shape, dtype=wire, device="meta")
    return _measure(context, Meter(), lambda: rule.direction(options, matrices, ops))


def probe_slab(
    rule: Rule[Any],
    options: MatrixOptions,
    shape: Shape,
    transposed: bool,
    cut: Slabs,
    ranks: int,
    rank: int,
    is_owner: bool,
    wire: torch.dtype,
    state: torch.dtype,
    team: range | None = None,
) -> Probe:
    """Return what a slab of a matrix takes on a rank under strategy ``gram`` or ``split``.

    Args:
        rule, options, wire, state: as in ``probe_whole``.
        shape: (m, n) as the matrix is stored.
        transposed: whether rules read it transposed.
        cut: how the matrix is cut into slabs.
        ranks: the number of ranks that share it.
        rank: the one that has the slab.
        is_owner: whether that rank owns it, and under ``gram`` evaluates the polynomial.
        team: under ``split`` the ranks that share the matrix; None: ``gram``.
    """
    context, meter = StepContext(rule, options, [NAME]), Meter()
    box = cut.box(rank, shape)
    place = rank if team is None else team.index(rank)
    owner = place if is_owner else (place + 1) % ranks
    batch = SlabBatch((0,), (owner,), shape, cut, box, team)
    kind = Reduction if team is None else SplitReduction
    reduction = kind(batch, SimulatedGroup(place, ranks), meter)
    slabs = torch.empty(1, box.rows, box.cols, dtype=wire, device="meta")
    if transposed:
        reduction, slabs = reduction.transposed(), slabs.mT
    kept = {
        name: _state(stacked_shape(spec, 1, reduction), spec.dtype or state)
        for name, spec in rule.state(options, reduction.shape).items()
    }
    ops = SlabMatrixOps(context, reduction, kept)
    return _measure(context, meter, lambda: rule.direction(options, slabs, ops))


def _state(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a quantity of a matrix's state after one step; counts are on the CPU, as always."""
    if dtype == torch.int64:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def _measure(context: StepContext, meter: Meter, compute: Callable[[], Tensor]) -> Probe:
    """Return what a computation takes."""
    with _Counter() as seen:
        result = compute()
    del result
    return Probe(
        sum(seen.flops.values()),
        context.polar_calls,
        seen.peak,
        sum(meter.bytes.values()),
        seen.flops[True],
        seen.touched,
        seen.operators,
        sum(meter.calls.values()),
    )


def _qr(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count Householder's QR with Q formed, of (..., m, n)."""
    *batch, m, n = shape
    long, short = max(m, n), min(m, n)
    return math.prod(batch) * (4 * long * short**2 - 4 * short**3 // 3)


def _cholesky(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count a Cholesky factorisation of (..., n, n)."""
    return math.prod(shape[:-2]) * int(shape[-1]) ** 3 // 3


def _triangular(a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count the solution of triangular systems: A of (..., n, n), B of (..., n, k) or (..., k, n).

    Args:
        a, b: the shapes.
        args, kwargs: others, without meaning here.
    """
    side = max(int(a[-1]), 1)
    return math.prod(b) * side


def _eigh(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count a symmetric eigendecomposition with vectors of (..., n, n), 9 n^3 (Golub, Van Loan)."""
    return math.prod(shape[:-2]) * 9 * int(shape[-1]) ** 3


DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten.linalg_qr: _qr,
    torch.ops.aten.linalg_cholesky_ex: _cholesky,
    torch.ops.aten.linalg_solve_triangular: _triangular,
    torch.ops.aten._linalg_eigh: _eigh,
}
"""The FLOPs of what torch's counter does not know."""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the operators inside of the ``with`` block take.

    Attributes:
        bytes, peak: of the tensors that were made: now, and at most.
        flops: of products and decompositions, by whether they are in float32 or wider.
        touched: bytes that all other operators read and write.
        operators: their number, all together, without those that make views.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.touched = self.operators = 0
        self.flops = {False: 0, True: 0}
        self._known: set[int] = set()
        self._formulas = FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS).flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the storages that it has made."""
        kwargs = kwargs or {}
        before = {s._cdata for s in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        for storage in _storages(result):
            if storage._cdata not in self._known and storage._cdata not in before:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        """Add the FLOPs of an operator, or the bytes that it touches."""
        if func.is_view:
            return
        self.operators += 1
        formula = self._formulas.get(func._overloadpacket)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if formula is not None:
            is_wide = any(t.dtype.itemsize >= torch.float32.itemsize for t in tensors[-2:])
            # torch's formulas do not know the dtype that a product may be asked for
            shaped = [arg for arg in args if not isinstance(arg, torch.dtype)]
            self.flops[is_wide] += formula(*shaped, **kwargs, out_val=result)
            return
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.touched += sum(t.numel() * t.itemsize for t in (*tensors, *made))

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
