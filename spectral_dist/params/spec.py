"""What is known of one parameter: its matrices, and why it is trained as it is."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from spectral_dist.params.splits import Split
from spectral_dist.sharding.layout import Matrix

TAGS = WeakTensorKeyDictionary()
"""The routes of tagged parameters. Not on the parameters, with which they would be pickled."""
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into names."""
WRONG_KIND = {
    "skew": "the model has been converted by spectral_dist.poet.convert, so its weights are"
    " frozen, and only spectral_dist.POET (SpectralPOET, spectral_poet) trains their"
    " rotations; name that one, or leave the conversion out",
    "matrix": "POET orthogonalizes no matrix; it trains the rotations of a model that"
    " spectral_dist.poet.convert(model) has converted: do that first, and name no matrices",
}
"""What an optimizer says that has no use for parameters of a kind."""


@dataclass(frozen=True)
class ParamSpec:
    """What becomes of one parameter: 'matrix', 'scalar' (AdamW), 'skew' (POET's) or 'frozen'."""

    name: str
    reference: TensorWeakRef | None
    """the parameter, which a framework may replace by shards: then it must not be kept for this"""
    shape: tuple[int, ...]
    kind: str
    reason: str
    matrices: tuple[Matrix, ...] = ()
    replicas: Any = None
    """the process group of the DistributedDataParallel that it was found in"""
    wrapper: weakref.ref[DistributedDataParallel] | None = None
    """that DistributedDataParallel"""
    one_sided: bool = False
    """whether its polar factor is to be taken exactly, by the Gram matrix of its short side"""
    stacked: bool = False
    """whether the first of three dimensions counts matrices"""
    layer: Any = None
    """the ``poet.layer.PoetLayer`` whose skew parameter this is"""
    later: ParamSpec | None = None
    """of a frozen parameter: what becomes of it if it is unfrozen"""
    problem: str = ""
    """of a frozen parameter: why nothing can, then"""

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter that was read, which somebody else has to keep."""
        parameter = None if self.reference is None else self.reference()
        if parameter is None:
            raise RuntimeError(
                f"{self.name}: the model that param_groups or tag has read is gone; keep it, or"
                " call them with the model that is to be trained"
            )
        return parameter  # type: ignore[no-any-return]

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether this parameter was read."""
        return self.reference is not None and self.reference() is tensor

    @property
    def stack(self) -> int:
        """Elements of each matrix of a stack, or of the parameter if it is none."""
        return math.prod(self.shape[1:] if self.stacked else self.shape)


@dataclass(frozen=True)
class ParamInfo:
    """What a parameter is by itself, before any pattern: see ``ParamSpec``.

    ``shape``: whole and unsharded; ``view``: as its matrices are read, if otherwise. ``split``: how
    it holds several matrices, unless the user says otherwise. ``name``: in the whole model, if a
    rank has a part of it and calls it otherwise; its matrices are called after that.
    ``transposed``: whether it is stored in x out.
    """

    shape: tuple[int, ...]
    kind: str
    reason: str
    view: tuple[int, ...] = ()
    split: Split | None = None
    name: str = ""
    transposed: bool = False


Inspector: TypeAlias = Callable[[str, nn.Parameter, nn.Module], ParamInfo]
"""Called with a parameter's name, itself and the module that has it."""


def plain_name(name: str) -> str:
    """Return a parameter's or module's name without what wrappers have put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
