"""Choose the text that each step trains on: a pure function of seed, step and batch size."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Windows:
    """A text's tokens, cut into windows of equal length.

    Window i predicts the tokens i * length + 1 .. (i + 1) * length.
    """

    def __init__(self, tokens: NDArray[np.unsignedinteger[Any]], length: int, split: str) -> None:
        self.tokens = tokens
        self.length = length
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise ValueError(
                f"the {split} text has {len(tokens)} tokens: too few for a sequence of {length}"
            )

    def rows(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return windows as rows of tokens.

        Args:
            indices: of the windows, (k,).

        Returns:
            int64, (k, length + 1): the inputs are [:, :-1] and the targets [:, 1:].
        """
        positions = indices[:, None] * self.length + np.arange(self.length + 1)
        return torch.from_numpy(self.tokens[positions].astype(np.int64))


def window_indices(step: int, batch: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the indices of the windows that a step trains on.

    Each epoch goes through all windows in a new random order.

    Args:
        step: from 0.
        batch: windows per step, over all ranks.
        count: the number of windows in the text.
        seed: of the order.

    Returns:
        (batch,)
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs, within = positions // count, positions % count
    return np.array(
        [_permutation(count, seed, int(e))[w] for e, w in zip(epochs, within, strict=True)],
        np.int64,
    )


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the data is smaller than it
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # RandomState's stream is frozen for good, unlike that of numpy's newer generators.
    return np.random.RandomState([seed, epoch]).permutation(count).astype(np.int64)


def rank_micro_batches(rows: torch.Tensor, micro: int, rank: int, world: int) -> list[torch.Tensor]:
    """Return one rank's micro-batches of a global batch.

    Which rows a step trains on does not depend on ``world``, only which rank has them.

    Args:
        rows: the global batch; its number of rows is a multiple of micro * world.
        micro: rows per micro-batch.
        rank, world: this rank's index among those that divide the batch, and their number.
    """
    assert len(rows) % (micro * world) == 0
    return list(torch.split(rows, micro))[rank::world]
