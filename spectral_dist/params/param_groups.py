"""Parameter groups for the optimizers: the matrices, then the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectral_dist.params.classify import classify
from spectral_dist.params.spec import TAGS, ParamSpec
from spectral_dist.params.splits import Split
from spectral_dist.params.table import show
from spectral_dist.rules.options import BaseOptions
from spectral_dist.rules.registry import option_names

EXACT = {"polar": "eigh", "polar_steps": None, "polar_dtype": "auto"}
"""What a group of one-sided matrices takes instead of the optimizer's own."""


def param_groups(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Groups for our optimizers: the matrices, then the rest. Options as in ``classify``.

    Groups may be given options of their own (``groups[1]["lr"] = 3e-4``) before they are used. What
    is frozen is left out; ``optimizer.add_param_group`` takes it once it is unfrozen.
    """
    routes = classify(model, matrices=matrices, scalars=scalars, split=split, one_sided=one_sided)
    show(routes)
    for route in routes:
        if route.kind == "frozen":
            TAGS[route.parameter] = route
    return grouped([r.parameter for r in routes if r.kind != "frozen"], routes)


def tag(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
) -> None:
    """Note each parameter's route, for frameworks that pass on bare parameters.

    Frozen parameters may be unfrozen later, and need no second call then.
    """
    routes = classify(
        model, matrices=matrices, scalars=scalars, split=split, one_sided=one_sided, later=True
    )
    show(routes)
    for route in routes:
        TAGS[route.parameter] = route


WRITE = "write spectral_dist.param_groups(model)"
"""Where the parameters of an optimizer come from."""


def _brief(given: object) -> str:
    return "None" if given is None else f"a {type(given).__name__}"


def _route_of(item: Any, known: dict[int, ParamSpec]) -> ParamSpec:
    name, parameter = item if isinstance(item, tuple) else ("", item)
    if not isinstance(parameter, torch.Tensor):
        raise ValueError(f"{parameter!r} is no parameter; {WRITE}")
    route: ParamSpec | None = known.get(id(parameter)) or TAGS.get(parameter)  # type: ignore[no-untyped-call]
    if route is None:
        what = name or f"a parameter of shape {tuple(parameter.shape)}"
        raise ValueError(
            f"{what}: bare parameters do not tell matrices from embeddings and heads; pass"
            " spectral_dist.param_groups(model), or call spectral_dist.tag(model) first (again, if"
            " it was sharded, copied or loaded since)"
        )
    if not parameter.requires_grad:
        raise ValueError(
            f"{route.name} is frozen (requires_grad is False); leave it out, as param_groups"
            " does, and call add_param_group once it is unfrozen"
        )
    if route.kind != "frozen":
        return route
    if route.later is None:  # it has been unfrozen since
        raise ValueError(f"{route.name} cannot be trained: {route.problem}")
    return replace(route.later, replicas=route.replicas, wrapper=route.wrapper, layer=route.layer)


def grouped(
    params: Iterable[Any],
    routes: Sequence[ParamSpec] = (),
    options: type[BaseOptions] = BaseOptions,
) -> list[dict[str, Any]]:
    """Split parameters, or groups of them, into groups of one kind, by ``routes`` or tags.

    A group's own options stay with both of its halves.

    Args:
        params: as torch's optimizers take them.
        routes: of parameters that are not tagged.
        options: of the optimizer, beside those that are registered.

    Raises:
        ValueError: a frozen parameter, or one whose route is not known.
    """
    every = option_names() | {f for kind in options.kinds() for f in options.names(kind)}

    def applies(name: str, kind: str) -> bool:
        return name in option_names(kind) or (
            kind in options.kinds() and name in options.names(kind)
        )

    known = {id(route.parameter): route for route in routes}
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
        halves: dict[tuple[str, torch.dtype, bool], list[ParamSpec]] = {}
        for item in parameters:
            route = _route_of(item, known)
            # float64 parameters keep float64 states, so they are exchanged on their own
            wide = torch.promote_types(route.parameter.dtype, torch.float32)
            halves.setdefault((route.kind, wide, route.one_sided), []).append(route)
        own = {k: v for k, v in group.items() if k != "params"}
        for name in own.keys() & every:
            if halves and not any(applies(name, kind) for kind, *_ in halves):
                raise ValueError(
                    f"a parameter group sets {name}, which none of its parameters has"
                    f" ({', '.join(route.name for half in halves.values() for route in half)})"
                )
        for (kind, _, exact), half in sorted(halves.items(), key=lambda item: item[0][::2]):
            mine = {k: v for k, v in own.items() if k not in every or applies(k, kind)}
            if exact:
                mine = {**EXACT, **mine}
            mine.update(params=[r.parameter for r in half], routes=half, kind=kind)
            result.append(mine)
    return result
