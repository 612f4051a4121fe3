"""Matrix state in Megatron's distributed checkpoints, which any number of other ranks can load.

Each quantity of each matrix has a key of its own, made of the matrix's name in the whole model. It
is saved in the boxes in which ranks keep it. At load every rank asks for the boxes that it has to
keep, however the saved ones were cut. The parameter that a matrix is in plays no part in this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from spectral_dist.core.matrix_state import MatrixStatePart
from spectral_dist.integrations.megatron import _compat

ENTRY = "spectral_matrices"
"""The key of matrix state in the state dict of one of Megatron's optimizers."""
PREFIX = "optimizer.spectral"
"""The prefix of keys in checkpoints; those of parameters' states begin with ``optimizer.state``."""


def sharded(
    parts: Iterable[MatrixStatePart], copied: Collection[str], loading: bool
) -> ShardedTensorFactory:
    """Return an entry of a sharded state dict that saves matrix state, or loads it.

    Every rank has to have one in its state dict. It is a factory because ``ChainedOptimizer``
    prefixes all keys in its optimizers' state dicts with the optimizer's number, which depends on
    the layout; keys that a factory makes afterwards stay as they are.

    Args:
        parts: the matrix state that this rank keeps.
        copied: the matrices whose state another pipeline stage keeps as well, and saves.
        loading: whether Megatron loads into the parts, rather than saves them.
    """
    chosen = [part for part in parts if loading or (part.is_primary and part.matrix not in copied)]

    def build(*_: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = {_label(part): _sharded_tensor(part, copied) for part in chosen}
        # an empty entry would be missing after loading, which is an error
        tensors[""] = LocalNonpersistentObject(None)
        return tensors

    return ShardedTensorFactory(ENTRY, None, build, lambda loaded: loaded)


def fill(parts: Iterable[MatrixStatePart], loaded: Mapping[str, Tensor]) -> None:
    """Copy what Megatron has loaded for ``sharded`` into the optimizer's matrix state.

    Args:
        parts: the matrix state that this rank keeps; its values are written.
        loaded: the entry of the loaded state dict.

    Raises:
        ValueError: a part is not in it; nothing has been written then.
    """
    parts = list(parts)
    missing = [part for part in parts if _label(part) not in loaded]
    if missing:
        raise ValueError(
            f"the checkpoint has no {_key(missing[0])} ({len(missing)} of the optimizer's tensors"
            " are not in it): it was saved with another optimizer, or with other matrices; build"
            " the optimizer as it was, or start it anew with --no-load-optim"
        )
    for part in parts:
        part.values.data.copy_(loaded[_label(part)])


def _key(part: MatrixStatePart) -> str:
    """Return the checkpoint's key of a quantity of a matrix."""
    return f"{PREFIX}.{part.name}.{part.matrix}"


def _label(part: MatrixStatePart) -> str:
    """Return a key of the part in the state dict, which holds several of one quantity."""
    return f"{_key(part)}@{','.join(map(str, part.offsets))}"


def _sharded_tensor(part: MatrixStatePart, copied: Collection[str]) -> ShardedTensor:
    """Return Megatron's description of a part: its box in the whole quantity, and its values."""
    shape = tuple(part.values.shape)
    # None allows boxes of any size; torch checks at saving that they cover the whole exactly once
    grid = (1,) * len(shape) if shape == part.shape else None
    is_copy = not part.is_primary or part.matrix in copied
    return _compat.sharded_tensor(_key(part), part.values, part.shape, part.offsets, grid, is_copy)
