"""The spec of one parameter: its matrices, how it is trained, and why."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from spectral_dist.params.splits import Split
from spectral_dist.sharding.matrix import Matrix

TAGS = WeakTensorKeyDictionary()
"""The specs of tagged parameters. They are no attributes of them, because those are pickled."""
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""The parts that torch.compile and activation checkpointing add to names."""
WRONG_KIND = {
    "skew": "the model has been converted by spectral_dist.poet.convert, so its weights are"
    " frozen, and only spectral_dist.POET (SpectralPOET, spectral_poet) trains their"
    " rotations; name that one, or leave the conversion out",
    "matrix": "POET orthogonalizes no matrix; it trains the rotations of a model that"
    " spectral_dist.poet.convert(model) has converted: do that first, and name no matrices",
}
"""The error of an optimizer that does not train parameters of a kind, by that kind."""


@dataclass(frozen=True)
class ParamSpec:
    """How one parameter is trained, and the matrices it holds.

    Attributes:
        name: in the whole model, without what wrappers put into it.
        reference: to the parameter; weak, because a framework may replace it by shards, and its
            memory must then be freed.
        shape: whole and unsharded.
        kind: 'matrix', 'scalar' (AdamW), 'skew' (POET's) or 'frozen'.
        reason: why it is of that kind, for the table of parameters.
        matrices: that it holds, if it is of kind 'matrix'.
        replicas: the process group of the DistributedDataParallel around the model.
        wrapper: that DistributedDataParallel.
        one_sided: whether its polar factor is computed exactly, by the Gram matrix of its short
            side.
        stacked: whether the first of three dimensions counts matrices.
        layer: the ``poet.layer.PoetLayer`` whose skew parameter this is.
        later: of a frozen parameter, its spec for when it is unfrozen.
        problem: of a frozen parameter, why it cannot be trained then.
    """

    name: str
    reference: TensorWeakRef | None
    shape: tuple[int, ...]
    kind: str
    reason: str
    matrices: tuple[Matrix, ...] = ()
    replicas: Any = None
    wrapper: weakref.ref[DistributedDataParallel] | None = None
    one_sided: bool = False
    stacked: bool = False
    layer: Any = None
    later: ParamSpec | None = None
    problem: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter, to which somebody else has to hold a reference.

        Raises:
            RuntimeError: nobody does any more.
        """
        parameter = None if self.reference is None else self.reference()
        if parameter is None:
            raise RuntimeError(
                f"{self.name}: the model that param_groups or tag has read is gone; keep it, or"
                " call them with the model that is to be trained"
            )
        return parameter  # type: ignore[no-any-return]

    @property
    def stack(self) -> int:
        """Return the number of elements of each matrix of a stack, or else of the parameter."""
        return math.prod(self.shape[1:] if self.stacked else self.shape)


@dataclass(frozen=True)
class ParamInfo:
    """What an inspector says of a parameter, before patterns override it and make a ``ParamSpec``.

    Attributes:
        shape: whole and unsharded.
        kind, reason: as in ``ParamSpec``.
        view: the shape in which its matrices are read; empty: ``shape``.
        split: how its rows, as rules read it, hold several matrices, unless the user says
            otherwise.
        holds: which ones, for the table.
        heads: for each part of the split (or the one matrix), the rows of each attention head; 0: a
            part without heads. Empty: it has none.
        name: in the whole model, after which its matrices are called; empty: the name that this
            rank knows it by, which differs if the rank has a part of the model only.
        transposed: whether it is stored (in, out).
    """

    shape: tuple[int, ...]
    kind: str
    reason: str
    view: tuple[int, ...] = ()
    split: Split | None = None
    holds: str = ""
    heads: tuple[int, ...] = ()
    name: str = ""
    transposed: bool = False


Inspector: TypeAlias = Callable[[str, nn.Parameter, nn.Module], ParamInfo]
"""Called with a parameter's name, the parameter and the module that has it."""


def plain_name(name: str) -> str:
    """Return the name of a parameter or module without what wrappers have put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
