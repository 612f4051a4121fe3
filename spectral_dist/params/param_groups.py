"""Parameter groups for the optimizers: the matrices, then the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist.params.classify import classify
from spectral_dist.params.spec import TAGS, ParamSpec
from spectral_dist.params.splits import Split
from spectral_dist.params.table import show
from spectral_dist.rules.options import BaseOptions
from spectral_dist.rules.registry import option_names

EXACT = {"polar": "eigh", "polar_steps": None, "polar_dtype": "auto"}
"""Options of a group of one-sided matrices, unless the user's group has others."""


@explained
def param_groups(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for the optimizers: the matrices, then the rest.

    Groups may be given options of their own (``groups[1]["lr"] = 3e-4``) before they are used.
    Frozen parameters are left out; ``optimizer.add_param_group`` takes them once they are unfrozen.
    A table of which parameters are matrices is written on the job's first rank.

    Args:
        model: as the user has it, in its wrappers or not.
        matrices, scalars, split, one_sided: as in ``classify``.

    Raises:
        ValueError: as in ``classify``.
    """
    specs = classify(model, matrices=matrices, scalars=scalars, split=split, one_sided=one_sided)
    show(specs)
    for spec in specs:
        if spec.kind == "frozen":
            TAGS[spec.parameter] = spec
    return split_by_kind([spec.parameter for spec in specs if spec.kind != "frozen"], specs)


@explained
def tag(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
) -> None:
    """Note how each parameter is trained, for frameworks that pass on bare parameters.

    Frozen parameters may be unfrozen later, and need no second call then. A table of which
    parameters are matrices is written on the job's first rank.

    Args:
        model: as the user has it, in its wrappers or not.
        matrices, scalars, split, one_sided: as in ``classify``.

    Raises:
        ValueError: as in ``classify``.
    """
    specs = classify(
        model, matrices=matrices, scalars=scalars, split=split, one_sided=one_sided, later=True
    )
    show(specs)
    for spec in specs:
        TAGS[spec.parameter] = spec


WRITE = "write spectral_dist.param_groups(model)"
"""What errors advise for the parameters of an optimizer."""


def _brief(value: object) -> str:
    """Return a few words for a bad argument."""
    return "None" if value is None else f"a {type(value).__name__}"


def _spec_of(item: Any, known: dict[int, ParamSpec]) -> ParamSpec:
    """Return the spec of a parameter, or (name, parameter), that is to be trained.

    Args:
        item: as torch's optimizers take it.
        known: specs by the id of their parameter, beside those that ``tag`` has recorded.

    Raises:
        ValueError: no parameter, one that is frozen or cannot be trained, or one without a spec.
    """
    name, parameter = item if isinstance(item, tuple) else ("", item)
    if not isinstance(parameter, torch.Tensor):
        raise ValueError(f"{parameter!r} is no parameter; {WRITE}")
    spec: ParamSpec | None = known.get(id(parameter)) or TAGS.get(parameter)  # type: ignore[no-untyped-call]
    if spec is None:
        what = name or f"a parameter of shape {tuple(parameter.shape)}"
        raise ValueError(
            f"{what}: bare parameters do not tell matrices from embeddings and heads; pass"
            " spectral_dist.param_groups(model), or call spectral_dist.tag(model) first (again, if"
            " it was sharded, copied or loaded since)"
        )
    if not parameter.requires_grad:
        raise ValueError(
            f"{spec.name} is frozen (requires_grad is False); leave it out, as param_groups"
            " does, and call add_param_group once it is unfrozen"
        )
    if spec.kind != "frozen":
        return spec
    if spec.later is None:  # it has been unfrozen since
        raise ValueError(f"{spec.name} cannot be trained: {spec.problem}")
    return replace(spec.later, replicas=spec.replicas, wrapper=spec.wrapper, layer=spec.layer)


def split_by_kind(
    params: Iterable[Any],
    specs: Sequence[ParamSpec] = (),
    options: type[BaseOptions] = BaseOptions,
) -> list[dict[str, Any]]:
    """Split parameters, or groups of them, into groups of one kind and dtype, by specs or tags.

    Each of the new groups keeps those options of its group that its kind has.

    Args:
        params: as torch's optimizers take them.
        specs: of parameters that are not tagged.
        options: of the optimizer, beside those that are registered.

    Returns:
        Groups with the keys "params", "kind" and "routes" (the parameters' specs). A group that has
        "routes" already is returned as it is.

    Raises:
        ValueError: a frozen parameter, or one whose spec is not known; an option that none of a
            group's parameters has.
    """
    all_names = option_names() | {f for kind in options.kinds() for f in options.names(kind)}

    def applies(name: str, kind: str) -> bool:
        return name in option_names(kind) or (
            kind in options.kinds() and name in options.names(kind)
        )

    known = {id(spec.parameter): spec for spec in specs}
    if isinstance(params, torch.Tensor | dict) or not isinstance(params, Iterable):
        raise ValueError(f"params is {_brief(params)}; {WRITE}")
    items = list(params)
    groups = [item for item in items if isinstance(item, dict)]
    loose = [item for item in items if not isinstance(item, dict)]
    result = []
    for group in (*groups, {"params": loose}) if loose else groups:
        if "routes" in group:
            result.append(group)
            continue
        parameters = group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        parts: dict[tuple[str, torch.dtype, bool], list[ParamSpec]] = {}
        for item in parameters:
            spec = _spec_of(item, known)
            # float64 parameters keep float64 states, so they are exchanged on their own
            wide = torch.promote_types(spec.parameter.dtype, torch.float32)
            parts.setdefault((spec.kind, wide, spec.one_sided), []).append(spec)
        set_options = {k: v for k, v in group.items() if k != "params"}
        for name in set_options.keys() & all_names:
            if parts and not any(applies(name, kind) for kind, *_ in parts):
                raise ValueError(
                    f"a parameter group sets {name}, which none of its parameters has"
                    f" ({', '.join(spec.name for part in parts.values() for spec in part)})"
                )
        for (kind, _, exact), part in sorted(parts.items(), key=lambda item: item[0][::2]):
            new_group = {
                k: v for k, v in set_options.items() if k not in all_names or applies(k, kind)
            }
            if exact:
                new_group = {**EXACT, **new_group}
            new_group.update(params=[spec.parameter for spec in part], routes=part, kind=kind)
            result.append(new_group)
    return result
