"""Which rows a step trains on: a pure function of seed, step and global batch size."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Windows:
    """Tokens cut into fixed windows; window i predicts tokens i*length+1 .. (i+1)*length."""

    def __init__(self, tokens: NDArray[np.unsignedinteger[Any]], length: int, part: str) -> None:
        self.tokens = tokens
        self.length = length
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise ValueError(
                f"the {part} text has {len(tokens)} tokens: too few for a sequence of {length}"
            )

    def rows(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """int64 (len(numbers), length + 1): inputs are [:, :-1], targets [:, 1:]."""
        places = numbers[:, None] * self.length + np.arange(self.length + 1)
        return torch.from_numpy(self.tokens[places].astype(np.int64))


def row_numbers(step: int, batch: int, count: int, seed: int) -> NDArray[np.int64]:
    """The windows of step `step` (from 0): a fresh permutation of all `count` windows per epoch."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, within = places // count, places % count
    return np.array(
        [_permutation(count, seed, int(e))[w] for e, w in zip(epochs, within, strict=True)],
        np.int64,
    )


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the data is smaller than it
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # RandomState's stream is frozen for good, unlike that of numpy's newer generators.
    return np.random.RandomState([seed, epoch]).permutation(count).astype(np.int64)


def share(rows: torch.Tensor, micro: int, rank: int, world: int) -> list[torch.Tensor]:
    """This rank's micro-batches, `micro` rows each, of a global batch.

    The set of rows of a step does not depend on `world`; rows must divide by micro * world.
    """
    assert len(rows) % (micro * world) == 0
    return list(torch.split(rows, micro))[rank::world]
