"""Options of parameter groups: what a group of one kind may set, and what it carries."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spectral_dist.rules.fields import plain, specs_of
from spectral_dist.rules.options import BaseOptions
from spectral_dist.rules.registry import nearest_option, option_names

FRAMEWORK_KEYS = {
    *("name", "initial_lr", "swa_lr", "param_names", "is_expert_group", "moe", "lr_mult"),
    *("max_lr", "min_lr", "base_momentum", "max_momentum", "last_batch_iteration"),
    *("wd_mult", "start_wd", "end_wd", "pre_wd_mult", "pre_lr_mult", "optimizer"),
    *("is_expert_parallel", "is_decoupled_lr", "default_config", "spectral_kind"),
}
"""Keys that schedulers and frameworks keep in parameter groups for themselves."""
RULE = "rule"
"""Key of every group whose value names the rule that its state belongs to; older checkpoints have
none."""


def group_options(
    group: Mapping[str, Any], base: BaseOptions, one_lr: bool = True
) -> dict[str, Any]:
    """Return the fields of a parameter group: the optimizer's options, changed by the group's own.

    Keys that are no option stay: frameworks keep their own there.

    Args:
        group: with ``kind``, and options of its own.
        base: the optimizer's options.
        one_lr: whether all groups have the optimizer's lr, and ratios to it.

    Raises:
        ValueError: an unknown option, one that this kind has not, or a bad value.
    """
    kind = group["kind"]
    carried = (base if one_lr else replace(base, scalar_lr=None)).group_fields(kind)
    group_values = {k: v for k, v in group.items() if k not in ("params", "kind", "routes", RULE)}
    known = option_names() | type(base).names(kind)
    for name in group_values:
        if name in known and name not in carried:
            hint = " (one_sided is for optimizers that have it: Muon, PolarGrad)" * (
                name == "polar"
            )
            raise ValueError(f"a parameter group of kind {kind!r} has no option {name!r}{hint}")
        if name not in known and name not in carried and name not in FRAMEWORK_KEYS:
            near = nearest_option(name)
            if near:
                raise ValueError(
                    f"a parameter group: unknown option {name!r}; did you mean {near!r}?"
                )
            warnings.warn(
                f"a parameter group has a key {name!r}, which is no option here and has no effect",
                stacklevel=3,
            )
    names = type(base).names(kind)
    values = {name: plain(value) for name, value in group_values.items() if name in names}
    if isinstance(values.get("betas"), list | tuple):
        values["betas"] = tuple(map(plain, values["betas"]))
    group_values.update(values)
    replace(base, **values).check("a parameter group")
    lr = group_values.pop("lr", None)
    if one_lr:
        if lr is not None:
            carried["lr_ratio"] = base.lr_ratio_of(lr, "a group's lr")
    else:
        lr = base.scalar_lr if lr is None and kind == "scalar" else lr
        carried["lr"] = base.lr if lr is None else lr
    carried.update(group_values)
    return carried


def check_shaping_options(
    options: type[BaseOptions],
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
) -> None:
    """Check that saved state fits the options that decide its shape.

    Args:
        options: the optimizer's class of options.
        groups: the optimizer's parameter groups.
        saved: those of the checkpoint, in the same order.

    Raises:
        ValueError: the state was saved with another value of such an option.
    """
    for group, saved_group in zip(groups, saved, strict=False):
        for name, spec in specs_of(options).items():
            value, saved_value = group.get(name), saved_group.get(name)
            if not spec.shapes_state or group["kind"] != saved_group.get("kind"):
                continue
            if value != saved_value:
                what = "and the checkpoint has none: it was saved with another optimizer"
                if name in saved_group:
                    hint = f"write the {name} that it was saved with"
                    what = f"but {saved_value} in the checkpoint; {hint}"
                raise ValueError(f"{name} is {value} here, {what}")
