"""Whether a batch of small matrices on a CPU gives the bits of each matrix alone: by a trial.

A CPU's GEMM may round by how an operand is aligned and how many there are. Results that must not
depend on the layout are therefore computed one matrix at a time, but where a trial on random
numbers shows that a batch of just this shape rounds alike. Products, sums and roots round in a way
that does not depend on the values, so that a difference shows at once. Powers and logarithms do not
(one in some hundred differs between a vector's lanes and its remainder); polar factors use none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALL = 4096
"""Elements of a matrix up to which a batch saves time: beyond, products take longer than calls."""
MULTIPLE = 8
"""Both sides must be of this: then every matrix, and all that is made of it, lies at 64 bytes."""
CPU_BATCH = 128
"""The most matrices that a CPU computes in one call: more save no time, and are longer tried."""
TRIALS = 3
"""Batches of random numbers that are tried."""


def batch_has_same_bits(
    compute: Callable[[Tensor, Sequence[int]], Sequence[Tensor]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> bool:
    """Return whether a computation gives the same bits on a batch and on each matrix of it.

    Args:
        compute: from matrices (j, m, n) in fresh memory, and their j places in the batch, to
            tensors (j, ...).
        shape: (k, m, n) of the batch.
        dtype: of the matrices.
    """
    count, m, n = shape
    if count == 1 or m * n > SMALL or m % MULTIPLE or n % MULTIPLE:
        return count == 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        matrices = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        together = compute(matrices.clone(), range(count))
        for i in range(count):
            alone = compute(matrices[i : i + 1].clone(), [i])
            if not all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True)):
                return False
    return True
