"""Matrix state in Megatron's distributed checkpoints: saved by owners, loaded by other ones.

Each quantity has a key of its own, made of the matrix's name in the whole model, and is saved in
the boxes in which ranks keep it; at load every rank asks for the boxes that it is to keep, however
they were cut. Nothing of this is known to the parameter that the matrix is in.
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
"""Key of the state in the state dict of one of Megatron's optimizers."""
PREFIX = "optimizer.spectral"
"""Of keys in checkpoints, where the parameters' states begin with ``optimizer.state``."""


def sharded(
    parts: Iterable[MatrixStatePart], copies: Collection[str], loading: bool
) -> ShardedTensorFactory:
    """The parts, for Megatron to save, or to load into; all ranks give one.

    ``copies``: matrices of which an earlier pipeline stage keeps the same, and saves it.

    A factory, because ``ChainedOptimizer`` puts its optimizers' numbers before the keys of all that
    is in their state dicts, and these depend on the layout: keys made afterwards stay as they are.
    """
    mine = [part for part in parts if loading or (part.is_primary and part.matrix not in copies)]

    def build(*args: Any) -> dict[str, Any]:
        found: dict[str, Any] = {_label(part): _tensor(part, copies) for part in mine}
        # without anything here the entry would be missing after loading, which is an error
        found[""] = LocalNonpersistentObject(None)
        return found

    return ShardedTensorFactory(ENTRY, None, build, lambda loaded: loaded)


def fill(parts: Iterable[MatrixStatePart], loaded: Mapping[str, Tensor]) -> None:
    """Copy what Megatron has loaded for ``sharded`` into the parts.

    Raises:
        ValueError: something was not in the checkpoint.
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
    return f"{PREFIX}.{part.name}.{part.matrix}"


def _label(part: MatrixStatePart) -> str:
    """Megatron takes boxes that begin at one place for the same."""
    return f"{_key(part)}@{','.join(map(str, part.offsets))}"


def _tensor(part: MatrixStatePart, copies: Collection[str]) -> ShardedTensor:
    shape = tuple(part.values.shape)
    # None: boxes of any size, of which torch checks that they cover the whole once, as it saves
    grid = (1,) * len(shape) if shape == part.shape else None
    again = not part.is_primary or part.matrix in copies
    return _compat.sharded_tensor(_key(part), part.values, part.shape, part.offsets, grid, again)
