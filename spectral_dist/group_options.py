"""What a parameter group of one kind may set, and its full options."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from spectral_dist import polar
from spectral_dist.options import (
    NOT_OF_MATRICES,
    BaseOptions,
    MuonOptions,
    POETOptions,
    PolarGradOptions,
    ROOTOptions,
    SUMOOptions,
)

FRAMEWORK_KEYS = {
    *("name", "initial_lr", "swa_lr", "param_names", "is_expert_group", "moe", "lr_mult"),
    *("max_lr", "min_lr", "base_momentum", "max_momentum", "last_batch_iteration"),
    *("wd_mult", "start_wd", "end_wd", "pre_wd_mult", "pre_lr_mult", "optimizer"),
    *("is_expert_parallel", "is_decoupled_lr", "default_config", "spectral_kind"),
}
"""Keys that schedulers and frameworks keep in parameter groups for themselves."""
_OF_MATRICES = (MuonOptions, PolarGradOptions, ROOTOptions, SUMOOptions)
OPTION_NAMES = frozenset(f.name for cls in (*_OF_MATRICES, POETOptions) for f in fields(cls))
MATRIX_NAMES = frozenset(f.name for cls in _OF_MATRICES for f in fields(cls)) - {*NOT_OF_MATRICES}
KIND_NAMES = {
    "matrix": MATRIX_NAMES,
    "scalar": {"lr", "weight_decay", "betas", "eps"},
    "skew": {"lr", "betas", "eps", "merge_every"},
}


def applies(name: str, kind: str) -> bool:
    """Whether a parameter group of this kind can have the option."""
    return name in KIND_NAMES[kind]


def group_options(group: Mapping[str, Any], base: BaseOptions) -> dict[str, Any]:
    """The full options of a group of one kind: the optimizer's, changed by the group's own.

    Keys that are no option stay: frameworks keep their own there.
    """
    kind = group["kind"]
    full = base.group(kind)
    own = {k: v for k, v in group.items() if k not in ("params", "kind", "routes")}
    for name in own:
        near = difflib.get_close_matches(name, OPTION_NAMES, n=1, cutoff=0.85)
        if name in OPTION_NAMES and name not in full:
            hint = " (one_sided is for optimizers that have it: Muon, PolarGrad)" * (
                name == "polar"
            )
            raise ValueError(f"a parameter group of kind {kind!r} has no option {name!r}{hint}")
        if name not in OPTION_NAMES and name not in full and name not in FRAMEWORK_KEYS:
            if near:
                raise ValueError(
                    f"a parameter group: unknown option {name!r}; did you mean {near[0]!r}?"
                )
            warnings.warn(
                f"a parameter group has a key {name!r}, which is no option here and has no effect",
                stacklevel=3,
            )
    type(base).from_user({k: v for k, v in own.items() if k in OPTION_NAMES}, "a parameter group")
    lr = own.pop("lr", None)
    if lr is not None:
        full["lr_ratio"] = base.ratio(lr, "a group's lr")
    if "betas" in own:
        own["betas"] = tuple(own["betas"])
    full.update(own)
    if kind == "matrix" and "polar" in full:
        polar.check(full["polar"], full["polar_steps"], full["polar_dtype"])
    return full
