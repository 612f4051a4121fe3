"""A matrix as it lies in its parameter: which rows and columns it is made of. Metadata only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of its parameter that a matrix is made of.

    Attributes:
        width: the number of columns of the parameter.
        runs: (first column, number of columns) of each run, in order.
        step: from one column of a run to the next.
    """

    width: int
    runs: tuple[tuple[int, int], ...]
    step: int = 1


@dataclass(frozen=True, slots=True)
class Matrix:
    """A 2-D block that is orthogonalized as one unit, as it lies in its parameter.

    Attributes:
        name: stable, and different from that of every other matrix.
        shape: (m, n), full and unsharded.
        blocks: the runs of whole rows that it is made of, in order: (first element in the flattened
            parameter, number of rows). Most matrices have one.
        transposed: whether it is stored (in, out), so that a rule gets its transpose.
        columns: of the parameter's rows, that it is made of; None: all.
    """

    name: str
    shape: tuple[int, int]
    blocks: tuple[tuple[int, int], ...]
    transposed: bool = False
    columns: Columns | None = None

    @property
    def numel(self) -> int:
        """Return the number of elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def read_shape(self) -> tuple[int, int]:
        """Return the shape of what rules get, (out, in)."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    @property
    def width(self) -> int:
        """Return the number of columns of the parameter."""
        return self.shape[1] if self.columns is None else self.columns.width

    def column_runs(self, left: int, right: int) -> Iterator[tuple[int, int, int]]:
        """Yield the runs of the matrix's columns that lie in some columns of its parameter.

        Args:
            left, right: columns [left, right) of the parameter.

        Yields:
            (first column in the matrix, first column in the parameter, number of columns).
        """
        columns = self.columns or Columns(self.shape[1], ((0, self.shape[1]),))
        col = 0
        for first, count in columns.runs:
            begin, end = (
                min(max(0, -((first - edge) // columns.step)), count) for edge in (left, right)
            )
            if begin < end:
                yield col + begin, first + begin * columns.step, end - begin
            col += count
