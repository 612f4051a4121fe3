"""When SUMO's steps on a matrix begin, learned without a wait for the device.

A matrix begins with its first gradient that is not zero, which only the device knows. So there its
first step stays uncounted until the next one, which reads what the first had copied to the host: a
whole step later, that is there, unless the host is that far ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.weak import WeakIdKeyDictionary

from spectral_dist._host_copy import HostCopy
from spectral_dist.rules.base import MatrixOps


@dataclass(frozen=True)
class _Copy:
    """|Q|^2 of each matrix of a batch, on its way to the host.

    Attributes:
        version: of the batch's step counts then. If they have another one, someone else has written
            the state (a checkpoint was loaded, say), and the copy is of no use.
        ranks: (k,), on the host.
    """

    version: int
    ranks: HostCopy

    def has_basis(self) -> list[bool]:
        """Return which matrices have a basis; waits for the copy."""
        return [rank > 0.5 for rank in self.ranks.values().tolist()]


_copies = WeakIdKeyDictionary()
"""A ``_Copy`` by the tensor of a batch's step counts."""


def count_first_steps(ops: MatrixOps) -> None:
    """Set the step counts that are 0 to 1 where the matrix has a basis.

    Call it at the beginning of a step. It waits for the copy that ``hold_back_first_steps`` made;
    in the first step of a run, and behind a checkpoint, for the device.
    """
    step = ops.state["step"]
    uncounted = [k for k, count in enumerate(step.tolist()) if count == 0]
    if not uncounted:
        return
    copied: _Copy | None = _copies.get(step)  # type: ignore[no-untyped-call]
    if copied is None or copied.version != step._version:
        copied = _copy(ops)
    has_basis = copied.has_basis()
    for k in uncounted:
        step[k] = int(has_basis[k])


def hold_back_first_steps(ops: MatrixOps) -> None:
    """Set the step counts that are 1 back to 0, and begin to copy which matrices have a basis.

    Call it at the end of a step, when its counts have been raised.
    """
    step = ops.state["step"]
    first = [k for k, count in enumerate(step.tolist()) if count == 1]
    for k in first:
        step[k] = 0
    if first:
        _copies[step] = _copy(ops)


def _copy(ops: MatrixOps) -> _Copy:
    """Begin to copy |Q|^2 of each matrix; a collective call where matrices are in slabs."""
    ranks = ops.inner(ops.state["basis"], ops.state["basis"])
    return _Copy(ops.state["step"]._version, HostCopy(ranks))
